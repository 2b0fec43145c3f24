"""HTC's semantic branch: its loss, its label maps, and what is said when they are missing or wrong."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from d2_frozen.data import BadDataError, build_train_loader, prepare_datasets
from d2_frozen.data.label_values import LABEL_VALUES
from d2_frozen.detection.semantic import SemanticBranch, padded_label_maps
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

Config = Callable[..., CfgNode]
SHAPES = {f"p{i}": ShapeSpec(channels=4, stride=1 << i) for i in range(2, 7)}
ON = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MODEL.ROI_HEADS.NAME", "HTCROIHeads") + (
    "MODEL.HTC.SEMANTIC_ON",
    True,
)


def branch(**changes: object) -> SemanticBranch:
    return SemanticBranch(SHAPES, **{"in_features": list(SHAPES), "stride": 8, "num_classes": 5, **changes})


def test_works_at_its_stride_for_any_size() -> None:
    sizes = {"p2": (15, 26), "p3": (8, 13), "p4": (4, 7), "p5": (2, 4), "p6": (1, 2)}
    logits, features = branch()({name: torch.randn(2, 4, *size) for name, size in sizes.items()})
    assert logits.shape == (2, 5, 8, 13) and features.shape == (2, 4, 8, 13)


def test_loss_of_undecided_logits_is_the_log_of_the_class_count() -> None:
    labels = torch.randint(0, 5, (2, 64, 64))
    labels[:, :32] = 255
    loss = branch(loss_weight=0.2).loss(torch.zeros(2, 5, 8, 8), labels)
    assert float(loss) == pytest.approx(0.2 * math.log(5), rel=1e-5)
    assert float(branch().loss(torch.zeros(2, 5, 8, 8), torch.full((2, 64, 64), 255))) == 0


def test_a_cell_takes_the_label_at_its_middle() -> None:
    """Stride 8: cells end at column 16, so the border of the labels falls between the second and the third."""
    labels = torch.zeros(1, 32, 32, dtype=torch.int64)
    labels[..., 16:] = 3
    logits = torch.full((1, 5, 4, 4), -20.0)
    logits[:, 0, :, :2] = logits[:, 3, :, 2:] = 20.0
    assert float(branch().loss(logits, labels)) < 1e-6


def test_maps_are_padded_with_the_ignored_value() -> None:
    batch = [
        {"image": torch.zeros(3, h, w), "sem_seg": torch.ones(h, w, dtype=torch.long)}
        for h, w in ((2, 3), (4, 2))
    ]
    stacked = padded_label_maps(batch, (4, 4), num_classes=2, ignore_value=255)
    assert (stacked == 1).sum(dim=(1, 2)).tolist() == [6, 8]
    assert (stacked == 255).sum(dim=(1, 2)).tolist() == [10, 8]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"image 7, a/b.jpg: no semantic label map.*MODEL.HTC.SEMANTIC_ON.*sem_seg"),
        (torch.zeros(3, 3, dtype=torch.long), r"image 7, a/b.jpg.*\(3, 3\) pixels, the image \(4, 4\)"),
        (torch.full((4, 4), 54), r"image 7, a/b.jpg.*label 54; MODEL.SEM_SEG_HEAD.NUM_CLASSES is 54"),
    ],
)
def test_wrong_maps_are_named(
    small_config: Config, labelled_image: Callable[[], dict], labels: torch.Tensor | None, message: str
) -> None:
    model = build_model(small_config(*ON))
    one = labelled_image()
    one |= {"image_id": 7, "file_name": "a/b.jpg", "image": one["image"][:, :4, :4]}
    if labels is not None:
        one["sem_seg"] = labels
    with pytest.raises(ValueError, match=message), EventStorage():
        model([one])


def test_its_features_reach_boxes_and_masks(small_config: Config, labelled_image: Callable[[], dict]) -> None:
    model = build_model(small_config(*ON))
    one = {**labelled_image(), "sem_seg": torch.zeros(64, 96, dtype=torch.long)}
    for name in ("loss_cls_stage2", "loss_mask_stage1", "loss_sem_seg"):
        model.zero_grad()
        with EventStorage():
            model([one])[name].backward()
        grads = {key: p.grad for key, p in model.roi_heads.semantic_branch.named_parameters()}
        assert (grads["embedding.weight"] is not None) == (name != "loss_sem_seg")
        assert (grads["predictor.weight"] is not None) == (name == "loss_sem_seg")
        assert grads["conv.0.weight"].abs().sum() > 0
    with torch.no_grad():
        assert model.eval()([labelled_image()])[0]["instances"].has("pred_masks")  # no map needed


def test_a_number_of_labels_that_is_none_is_named(small_config: Config) -> None:
    with pytest.raises(ValueError, match=r"MODEL.SEM_SEG_HEAD.NUM_CLASSES is -1.*HTC.SEMANTIC_ON"):
        build_model(small_config(*ON, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", -1))


def test_another_meta_architecture_is_refused(
    small_config: Config, labelled_image: Callable[[], dict]
) -> None:
    model = build_model(small_config(*ON, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    with pytest.raises(ValueError, match="META_ARCHITECTURE: FrozenRCNN"), EventStorage():
        model([labelled_image()])


@pytest.fixture
def two_halves(tmp_path: Path) -> Path:
    """One 60 x 80 image, black and white halves, with the label map 0 and 1, and one object."""
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "maps/sub").mkdir(parents=True)
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, 40:] = 255
    cv2.imwrite(str(tmp_path / "images/sub/a.png"), image)
    cv2.imwrite(str(tmp_path / "maps/sub/a.png"), (image[..., 0] > 0).astype(np.uint8))
    box = [5, 5, 60, 40]
    polygon = [5, 5, 65, 5, 65, 45, 5, 45]
    document = {
        "images": [{"id": 3, "file_name": "sub/a.png", "width": 80, "height": 60}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 1, "bbox": box, "segmentation": [polygon]}
            | {"area": 2400, "iscrowd": 0}
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps(document))
    return tmp_path


def data_config(small_config: Config, folder: Path, **fields: str) -> CfgNode:
    entry = {"name": f"halves{folder.name}", "type": "coco_instances", "json": str(folder / "train.json")}
    entry |= {"images": str(folder / "images"), **fields}
    options = ["DATASETS.REGISTER", [entry], "DATASETS.TRAIN", (entry["name"],), "DATASETS.TEST", ()]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", -1, "SEED", 1, "DATALOADER.NUM_WORKERS", 0]
    options += ["SOLVER.IMS_PER_BATCH", 1, "INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.SIZE", 64]
    options += ["OUTPUT_DIR", str(folder), "INPUT.MASK_FORMAT", "polygon"]
    return small_config(*ON, *options)


@pytest.mark.parametrize("ignored", [255, 7, 300])
def test_maps_follow_the_augmentation(small_config: Config, two_halves: Path, ignored: int) -> None:
    """Resize 0.1 to 2, crop, flip: where the picture is black the label is 0, where white 1, ignored in the padding."""
    cfg = data_config(small_config, two_halves, sem_seg=str(two_halves / "maps"))
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = ignored
    prepare_datasets(cfg)
    seen = set()
    for _, (sample,) in zip(range(12), build_train_loader(cfg)):
        image, labels = sample["image"][0], sample["sem_seg"]
        assert labels.shape == image.shape == (64, 64)
        assert (image[labels == ignored] == 128).all()
        black, white = image < 20, image > 235
        assert (labels[black] == 0).float().mean() > 0.97 or not black.any()
        assert (labels[white] == 1).float().mean() > 0.97 or not white.any()
        assert sample[LABEL_VALUES] == labels.unique().tolist()
        seen |= set(sample[LABEL_VALUES])
    assert seen == {0, 1, ignored}


def test_missing_maps_are_found_before_training(small_config: Config, two_halves: Path) -> None:
    with pytest.raises(ValueError, match=r"halves.*image 3.*sub/a.png.*has no semantic label maps"):
        prepare_datasets(data_config(small_config, two_halves))


def test_a_missing_file_is_named(small_config: Config, two_halves: Path) -> None:
    (two_halves / "maps/sub/a.png").unlink()
    cfg = data_config(small_config, two_halves, sem_seg=str(two_halves / "maps"))
    with pytest.raises(FileNotFoundError, match=r"image 3.*no semantic label map at .*maps/sub/a.png"):
        prepare_datasets(cfg)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((60, 80), 54, np.uint8), r"label value out of range .*a.png has 54; .*NUM_CLASSES is 54"),
        (np.zeros((80, 60), np.uint8), r"differ in size .*a.png is 60x80, the image 80x60.*SKIP_BAD True"),
    ],
)
def test_maps_that_cannot_be_are_found_before_training(
    small_config: Config, two_halves: Path, labels: np.ndarray, message: str
) -> None:
    """Labels that are no classes end a run at their first sample; other sizes may be left out."""
    cv2.imwrite(str(two_halves / "maps/sub/a.png"), labels)
    cfg = data_config(small_config, two_halves, sem_seg=str(two_halves / "maps"))
    with pytest.raises(BadDataError, match=f"(?s){message}"):
        prepare_datasets(cfg)
    cfg.DATASETS.SKIP_BAD = True
    with pytest.raises(BadDataError) if labels.any() else contextlib.nullcontext():
        prepare_datasets(cfg)
