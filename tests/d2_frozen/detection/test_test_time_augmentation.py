"""TEST.AUG: the identity changes nothing, sizes and mirrors are what the config says, and runs report it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from d2_frozen.detection import FrozenRCNNWithTTA
from d2_frozen.train_net import main
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNNWithTTA, ProposalNetwork, build_model
from detectron2.structures import Instances

Config = Callable[..., CfgNode]
Image = Callable[[], dict]
HEADS = ["StandardROIHeads", "CascadeROIHeads", "HTCROIHeads"]


@pytest.fixture
def detector(small_config: Config) -> Callable[..., tuple[CfgNode, nn.Module]]:
    """``detector(heads, sizes, flip, "KEY", value, ...)`` -> config and model."""

    def build(heads: str, sizes: list[int], flip: bool, *options: object) -> tuple[CfgNode, nn.Module]:
        cfg = small_config(
            *("MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", heads != HEADS[0]),
            *("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", sizes, "TEST.AUG.FLIP", flip),
            *("MODEL.FPN.NORM", "BN", *options),
        )
        torch.manual_seed(0)
        return cfg, build_model(cfg).eval()

    return build


@pytest.fixture
def picture(labelled_image: Image) -> dict:
    """64 x 96, bytes as DatasetMapper gives them."""
    one = labelled_image()
    return {**one, "image": one["image"].to(torch.uint8)}


def assert_same(a: Instances, b: Instances) -> None:
    assert len(a) == len(b) > 0
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-4)
    assert torch.equal(a.pred_classes, b.pred_classes)
    assert (a.pred_masks != b.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("nms", ["nms", "soft_nms_linear", "soft_nms_gaussian"])
@pytest.mark.parametrize("heads", HEADS)
def test_the_identity_is_plain_inference(detector: Callable, picture: dict, heads: str, nms: str) -> None:
    cfg, model = detector(
        heads, [96], False, "INPUT.AUGMENTATION", "scale_crop", "MODEL.ROI_HEADS.NMS_TYPE", nms
    )
    with torch.no_grad():
        plain = model([picture])[0]["instances"]
    assert_same(FrozenRCNNWithTTA(cfg, model)([picture])[0]["instances"], plain)
    assert model.roi_heads.mask_on and getattr(model.roi_heads, "soft_nms_on", True)


@pytest.mark.parametrize("heads", HEADS)
def test_equals_detectron2_on_the_shortest_edge(detector: Callable, picture: dict, heads: str) -> None:
    """One copy per batch there: else its copies of different sizes are padded to one."""
    cfg, model = detector(heads, [48, 80], True)
    with torch.no_grad():
        theirs = GeneralizedRCNNWithTTA(cfg, model, batch_size=1)([picture])[0]["instances"]
    assert_same(FrozenRCNNWithTTA(cfg, model)([picture])[0]["instances"], theirs)


@pytest.mark.parametrize(
    ("options", "max_size", "expected"),
    [
        (["resize_shortest_edge", "long_side"], 120, [(32, 48), (64, 96), (80, 120)]),
        (["scale_crop", "shortest_edge"], 120, [(32, 48), (64, 96), (80, 120)]),
        (["scale_crop", "long_side"], 120, [(21, 32), (43, 64), (80, 120)]),
        (["scale_crop", "square"], 4000, [(32, 32), (64, 64), (160, 160)]),
    ],
)
def test_sizes(detector: Callable, picture: dict, options: list[str], max_size: int, expected: list) -> None:
    """Sizes 32, 64, 160 of a 64 x 96 image; the square's side is the long one, which then is the whole batch's."""
    kind, resize = options
    cfg, model = detector(
        *("StandardROIHeads", [32, 64, 160], True, "INPUT.AUGMENTATION", kind, "TEST.AUG.MAX_SIZE", max_size),
        *("INPUT.SCALE_CROP.TEST_RESIZE", resize, "INPUT.SCALE_CROP.SIZE", 96),
    )
    seen = []
    preprocess = model.preprocess_image

    def spy(batch: list[dict]):
        images = preprocess(batch)
        assert len(batch) == 2 and torch.equal(batch[0]["image"], batch[1]["image"].flip(dims=[2]))
        padded = tuple(images.tensor.shape[-2:])
        seen.append(padded if resize == "square" else images.image_sizes[0])
        return images

    model.preprocess_image = spy
    FrozenRCNNWithTTA(cfg, model)([picture])
    assert seen == expected
    assert model.square == (96 if resize == "square" else 0)


def test_features_are_kept_or_made_again(detector: Callable, picture: dict) -> None:
    cfg, model = detector("CascadeROIHeads", [48, 64], True)
    runs = []
    model.backbone.register_forward_hook(lambda *_: runs.append(1))
    kept = FrozenRCNNWithTTA(cfg, model)([picture])[0]["instances"]
    assert len(runs) == 2
    again = FrozenRCNNWithTTA(cfg, model, keep_features_bytes=0)([picture])[0]["instances"]
    assert len(runs) == 2 + 4
    assert_same(kept, again)


def test_output_size_is_the_original_images(detector: Callable, picture: dict) -> None:
    """The same picture said to be twice as large: boxes double."""
    cfg, model = detector("HTCROIHeads", [64], True)
    augmented = FrozenRCNNWithTTA(cfg, model)
    small = augmented([picture])[0]["instances"]
    large = augmented([{**picture, "height": 128, "width": 192}])[0]["instances"]
    assert large.image_size == (128, 192) and large.pred_masks.shape[1:] == (128, 192)
    torch.testing.assert_close(large.pred_boxes.tensor, 2 * small.pred_boxes.tensor, rtol=1e-4, atol=1e-3)


def test_boxes_only(detector: Callable, picture: dict) -> None:
    cfg, model = detector("HTCROIHeads", [64, 80], True, "MODEL.MASK_ON", False)
    found = FrozenRCNNWithTTA(cfg, model)([picture])[0]["instances"]
    assert len(found) > 0 and not found.has("pred_masks")


def test_nothing_found(detector: Callable, picture: dict) -> None:
    cfg, model = detector("HTCROIHeads", [64, 80], True, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    found = FrozenRCNNWithTTA(cfg, model)([picture])[0]["instances"]
    assert len(found) == 0 and found.pred_masks.shape == (0, 64, 96)


def test_what_cannot_be_augmented_is_said(
    detector: Callable, picture: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, model = detector("StandardROIHeads", [64], True)
    with pytest.raises(ValueError, match="for R-CNN detectors, the model is ProposalNetwork"):
        FrozenRCNNWithTTA(cfg, build_model(_with(cfg, "MODEL.META_ARCHITECTURE", ProposalNetwork.__name__)))
    with pytest.raises(ValueError, match=r"MIN_SIZES is \(\)"):
        FrozenRCNNWithTTA(_with(cfg, "TEST.AUG.MIN_SIZES", ()), model)
    fixed = property(lambda _: {"square_size": 64})
    monkeypatch.setattr(type(model.backbone), "padding_constraints", fixed, raising=False)
    with pytest.raises(ValueError, match=r"a copy of 64 x 96 pixels does not fit the 64 x 64 square"):
        FrozenRCNNWithTTA(cfg, model)([picture])


def _with(cfg: CfgNode, key: str, value: object) -> CfgNode:
    changed = cfg.clone()
    changed.merge_from_list([key, value])
    return changed


def test_runs_report_it_after_training_and_with_eval_only(
    flags: Callable[..., Namespace], tmp_path: Path
) -> None:
    """HTC, Soft-NMS and two sizes by config alone; evaluating the saved weights gives the same metrics."""
    options = [
        *("MODEL.ROI_HEADS.NAME", "HTCROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
        *("MODEL.ROI_HEADS.NMS_TYPE", "soft_nms_gaussian", "TEST.AUG.ENABLED", "True", "TEST.PICTURES", "0"),
        *("TEST.AUG.MIN_SIZES", "(64, 80)", "SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "2"),
    ]
    first = main(flags(*options))
    assert list(first) == ["bbox", "segm", "bbox_TTA", "segm_TTA"]
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert {"bbox/AP", "segm/AP", "bbox_TTA/AP", "segm_TTA/AP"} <= lines[-1].keys()
    assert (out / "inference_TTA/coco_instances_results.json").exists()
    again = main(flags("--eval-only", *options, "MODEL.WEIGHTS", str(out / "model_final.pth")))
    assert _rounded(again) == _rounded(first)
    # Stopped after iteration 2 and resumed, it ends with the same weights.
    last = torch.load(out / "model_final.pth", weights_only=True)["model"]
    (out / "last_checkpoint").write_text("model_0000001.pth")
    main(flags("--resume", *options, "TEST.AUG.ENABLED", "False"))
    resumed = torch.load(out / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(last[key], resumed[key]) for key in last) and len(last) == len(resumed)


def _rounded(results: dict) -> dict:
    """Comparable: a class without objects has AP NaN."""
    return {task: {k: f"{v:.3f}" for k, v in metrics.items()} for task, metrics in results.items()}
