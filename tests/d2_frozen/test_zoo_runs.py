"""train_net.py with the zoo: evaluate a zoo file, and train a BiFPN on the zoo's frozen backbone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from d2_frozen.engine import FrozenTrainer, frozen_parts
from d2_frozen.train_net import argument_parser, evaluation_model, main, read_config, setup

ZOO = Path(__file__).resolve().parents[2] / "configs" / "zoo"
SMALL_INPUT = """MODEL.DEVICE=cpu INPUT.MIN_SIZE_TEST=64 INPUT.MAX_SIZE_TEST=64 INPUT.MIN_SIZE_TRAIN=(64,)
DATALOADER.NUM_WORKERS=0 TEST.PICTURES=0 SEED=7"""
NARROW = """MODEL.RESNETS.STEM_OUT_CHANNELS=4 MODEL.RESNETS.WIDTH_PER_GROUP=4 MODEL.RESNETS.RES2_OUT_CHANNELS=8
MODEL.FPN.OUT_CHANNELS=64 MODEL.ROI_BOX_HEAD.FC_DIM=16 MODEL.ROI_MASK_HEAD.CONV_DIM=8"""
FROZEN = """MODEL.META_ARCHITECTURE=FrozenRCNN MODEL.BACKBONE.NAME=build_frozen_backbone MODEL.FPN.NORM=GN
MODEL.FROZEN.BOTTOM_UP=build_resnet_backbone MODEL.BIFPN.NUM_LAYERS=1"""
MASK_RCNN = str(ZOO / "mask_rcnn_R_50_FPN_3x.yaml")


def options_of(*texts: str) -> list[str]:
    """ "KEY=VALUE KEY=VALUE" -> [KEY, VALUE, KEY, VALUE]."""
    return [part for text in texts for setting in text.split() for part in setting.split("=", 1)]


@pytest.fixture
def data(tiny_world: Path, tmp_path: Path) -> list[str]:
    """Options that point a COCO config at the tiny world."""
    entries = [
        {
            "name": f"zoo_{part}",
            "type": "coco_instances",
            "json": f"{tiny_world}/{part}.json",
            "images": f"{tiny_world}/{part}",
        }
        for part in ("train", "val")
    ]
    options = ["DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('zoo_train',)", "DATASETS.TEST"]
    return [
        *options,
        "('zoo_val',)",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "-1",
        "OUTPUT_DIR",
        str(tmp_path / "out"),
    ]


def zoo_pickle(path: Path) -> dict[str, torch.Tensor]:
    """A file as Detectron2's model zoo publishes them, of a model with random weights; returns its tensors."""
    cfg = read_config(MASK_RCNN, options_of(SMALL_INPUT, NARROW, "MODEL.ROI_HEADS.NUM_CLASSES=6"))
    state = FrozenTrainer.build_model(cfg).state_dict()
    weights = {name: tensor.numpy() for name, tensor in state.items()}
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}, protocol=2))
    return {name: tensor.clone() for name, tensor in state.items()}


def test_evaluation_of_a_zoo_file(data: list[str], tmp_path: Path) -> None:
    """mask_rcnn_R_50_FPN_3x with narrow layers, on small pictures."""
    zoo_pickle(tmp_path / "model_final.pkl")
    weights = options_of(f"MODEL.WEIGHTS={tmp_path}/model_final.pkl MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.0")
    flags = ["--config-file", MASK_RCNN, "--eval-only", *weights, *options_of(SMALL_INPUT, NARROW), *data]
    results = main(argument_parser().parse_args(flags))
    assert set(results) == {"bbox", "segm"} and results["segm"]["AP"] >= 0
    found = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert found and "segmentation" in found[0]


def test_bifpn_on_the_zoos_frozen_backbone(data: list[str], tmp_path: Path) -> None:
    """All of ResNet frozen: bit-identical after training, its fingerprint and source in the file, not its tensors."""
    source = zoo_pickle(tmp_path / "zoo.pkl")
    options = [*options_of(SMALL_INPUT, NARROW, FROZEN), *data]
    steps = options_of("SOLVER.MAX_ITER=3 SOLVER.STEPS=() SOLVER.IMS_PER_BATCH=2 SOLVER.BASE_LR=0.001")
    start = ["MODEL.WEIGHTS", str(tmp_path / "zoo.pkl")]
    main(argument_parser().parse_args(["--config-file", MASK_RCNN, *options, *steps, *start]))

    final = tmp_path / "out" / "model_final.pth"
    content = torch.load(final, weights_only=True)
    assert not [name for name in content["model"] if name.startswith("backbone.bottom_up.")]
    (fact,) = content["frozen"]
    assert fact["prefix"] == "backbone.bottom_up" and fact["source"] == str(tmp_path / "zoo.pkl")
    trained = "roi_heads.box_head.fc1.weight"
    assert not torch.equal(content["model"][trained], source[trained])

    flags = ["--config-file", MASK_RCNN, "--eval-only", *options, "MODEL.WEIGHTS", str(final)]
    model = evaluation_model(setup(argument_parser().parse_args(flags)))
    part = frozen_parts(model)["backbone.bottom_up"]
    assert part.fingerprint()["sha256"] == fact["sha256"]
    assert not [name for name, parameter in part.named_parameters() if parameter.requires_grad]
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, source[f"backbone.bottom_up.{name}"]), name


def test_boxes_from_files_are_refused_before_anything_is_built(data: list[str]) -> None:
    """Their .pkl files would be one more thing to unpickle; Fast R-CNN is there for model_zoo only."""
    flags = ["--config-file", str(ZOO / "fast_rcnn_R_50_FPN_1x.yaml"), *data]
    with pytest.raises(ValueError, match=r"LOAD_PROPOSALS.*faster_rcnn_R_50_FPN_1x"):
        setup(argument_parser().parse_args(flags))
