"""Image and label map stay together through every augmentation; ids come out as the model wants them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2_frozen import tasks
from d2_frozen.data import build_train_loader
from d2_frozen.data.label_maps import LabelMapError
from d2_frozen.data.label_values import LABEL_VALUES
from detectron2.config import CfgNode
from seg_app.data import SegmentationMapper


def config(*pairs: object) -> CfgNode:
    cfg = tasks.read_config("", ["MODEL.META_ARCHITECTURE", "FrozenSegmentor"])
    cfg.merge_from_list(
        [
            *("SEED", 5, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0),
            *(
                "INPUT.MIN_SIZE_TRAIN",
                (30, 60),
                "INPUT.MIN_SIZE_TRAIN_SAMPLING",
                "range",
                "INPUT.FORMAT",
                "RGB",
            ),
            *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [32, 32]),
            *pairs,
        ]
    )
    return cfg


def record_of(folder: Path, labels: np.ndarray, image: np.ndarray | None = None) -> dict:
    """Red is the label, where no image is given."""
    if image is None:
        image = np.zeros((*labels.shape, 3), np.uint8)
        image[..., 0] = np.where(labels == 0, 0, 200)
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(labels).save(folder / "labels.png")
    return {"file_name": str(folder / "image.png"), "sem_seg_file_name": str(folder / "labels.png")}


def test_labels_follow_the_image(tmp_path: Path) -> None:
    labels = np.zeros((40, 50), np.uint8)
    labels[10:30, 5:25] = 1
    mapper = SegmentationMapper.from_config(config(), is_train=True)
    record = record_of(tmp_path, labels)
    for seed in range(5):
        np.random.seed(seed)
        sample = mapper(record)
        assert sample["image"].shape[1:] == sample["sem_seg"].shape
        assert sample[LABEL_VALUES] == sample["sem_seg"].unique().tolist()
        red = sample["image"][0] > 100
        assert (
            red != (sample["sem_seg"] == 1)
        ).float().mean() < 0.05  # the edge is blurred in the image only


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (33, 1), (17, 23)])
def test_odd_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    cfg = config("INPUT.MAX_SIZE_TRAIN", 64, "INPUT.MAX_SIZE_TEST", 64)
    record = record_of(tmp_path, np.zeros(size, np.uint8))
    for is_train in (True, False):
        sample = SegmentationMapper.from_config(cfg, is_train)(record)
        assert min(sample["image"].shape) >= 1 and sample["image"].dtype == torch.uint8
        assert (sample["height"], sample["width"]) == size


def test_ids_above_255_and_the_datas_own_ignore_label(tmp_path: Path) -> None:
    numbers = np.uint16([[0, 299, 65535], [256, 255, 1]])
    record = {**record_of(tmp_path, numbers, np.zeros((2, 3, 3), np.uint8)), "ignore_label": 65535}
    mapper = SegmentationMapper(True, augmentations=[], ignore_value=1000)
    sample = mapper(record)
    assert sample["sem_seg"].tolist() == [[0, 299, 1000], [256, 255, 1]]
    assert sample[LABEL_VALUES] == [0, 1, 255, 256, 299, 1000]


def test_an_image_with_more_than_255_classes(tmp_path: Path) -> None:
    numbers = np.arange(400, dtype=np.uint16).reshape(20, 20)
    record = {**record_of(tmp_path, numbers, np.zeros((20, 20, 3), np.uint8)), "ignore_label": 399}
    expected = numbers.astype(int)
    expected[-1, -1] = 65535
    mapper = SegmentationMapper(True, augmentations=[], ignore_value=65535)
    sample = mapper(record)
    assert (sample["sem_seg"].numpy() == expected).all()
    assert sample[LABEL_VALUES] == np.unique(expected).tolist()


def test_ids_that_are_no_classes_are_an_error_of_the_sample(tmp_path: Path) -> None:
    """In the mapper, so that DATASETS.SKIP_BAD draws another image; large sets are not decoded before training."""
    record = record_of(tmp_path, np.uint8([[0, 1], [7, 255]]))
    cfg = config("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3)
    with pytest.raises(LabelMapError, match=r"out of range \(.*png has 7; the 3 classes are 0 to 2"):
        SegmentationMapper.from_config(cfg, is_train=True)(record)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 8
    SegmentationMapper.from_config(cfg, is_train=True)(record)


def test_size_mismatch_names_both_files(tmp_path: Path) -> None:
    record = record_of(tmp_path, np.zeros((4, 4), np.uint8), np.zeros((4, 5, 3), np.uint8))
    with pytest.raises(LabelMapError, match=r"labels.png is 4x4, .*image.png is 5x4"):
        SegmentationMapper(True, augmentations=[])(record)


def test_no_class_may_fill_a_crop(tmp_path: Path) -> None:
    """A quarter of the map is class 1: crops with the cap hold both classes wherever they are."""
    labels = np.zeros((64, 64), np.uint8)
    labels[:32, :32] = 1
    cfg = config("INPUT.MIN_SIZE_TRAIN", (64, 64), "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.95)
    mapper, record = SegmentationMapper.from_config(cfg, is_train=True), record_of(tmp_path, labels)
    np.random.seed(0)
    shares = [mapper(record)["sem_seg"].float().mean().item() for _ in range(8)]
    assert all(0.05 <= share <= 0.95 for share in shares)


def test_draws_depend_on_seed_and_position_only(tmp_path: Path) -> None:
    labels = np.random.RandomState(0).randint(0, 4, (40, 40)).astype(np.uint8)
    cfg = config("INPUT.COLOR_AUG_SSD", True)
    records = [
        record_of(tmp_path, labels, np.random.RandomState(1).randint(0, 255, (40, 40, 3)).astype(np.uint8))
    ] * 3
    mapper = SegmentationMapper.from_config(cfg, is_train=True)

    def batches(start: int, count: int) -> list:
        np.random.seed(start)  # what a process did before must not matter
        stream = iter(build_train_loader(cfg, start_iteration=start, mapper=mapper, dataset=records))
        return [next(stream) for _ in range(count)]

    whole, resumed = batches(0, 4), batches(2, 2)
    for first, second in zip(whole[2:], resumed):
        for a, b in zip(first, second):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["sem_seg"], b["sem_seg"])
    assert not torch.equal(whole[0][0]["image"], whole[1][0]["image"])


def test_scale_crop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"INPUT.AUGMENTATION is 'scale_crop'.*INPUT.CROP"):
        SegmentationMapper.from_config(config("INPUT.AUGMENTATION", "scale_crop"), is_train=True)


def test_a_crop_without_pixels_is_refused_before_any_image_is_read() -> None:
    with pytest.raises(ValueError, match=r"INPUT.CROP.SIZE is \[0, 64\]"):
        SegmentationMapper.from_config(config("INPUT.CROP.SIZE", [0, 64]), is_train=True)
