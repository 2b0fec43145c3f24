"""Augmentations by config; crops keep labels exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from d2_frozen.data import build_augmentations
from d2_frozen.data.mask_outline import mask_to_polygons
from d2_frozen.data.transforms import ClippingCrop, SquareCrop, clip_polygon
from detectron2.data import transforms as T


def area(polygon):
    x, y = polygon.T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def test_clip_against_hand_made_cases():
    square = np.array([[0.0, 0], [4, 0], [4, 4], [0, 4]])
    assert np.array_equal(clip_polygon(square, -1, -1, 9, 9), square)
    assert area(clip_polygon(square, 1, 2, 9, 9)) == 3 * 2
    assert clip_polygon(square, 5, 5, 9, 9).shape == (0, 2)
    assert clip_polygon(square, 4, 0, 9, 9).shape == (0, 2)  # only an edge is left
    triangle = np.array([[0.0, 0], [4, 0], [0, 4]])
    assert area(clip_polygon(triangle, 0, 0, 2, 2)) == 4
    assert area(clip_polygon(triangle, 0, 0, 3, 9)) == 8 - 0.5


@pytest.mark.parametrize("seed", range(8))
def test_cropped_polygons_are_the_cropped_mask(seed):
    """Masks with parts and holes: crop of the outline = outline of the crop, pixel by pixel."""
    rng = np.random.RandomState(seed)
    mask = rng.random_sample((20, 30)) < 0.7
    crop = ClippingCrop(int(rng.randint(0, 9)), int(rng.randint(0, 5)), 17, 13, 30, 20)
    polygons = [np.array(p, dtype=float).reshape(-1, 2) for p in mask_to_polygons(mask)]
    cropped = [p.reshape(-1).tolist() for p in crop.apply_polygons(polygons)]
    got = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(cropped, 13, 17)))
    assert np.array_equal(got.astype(bool), crop.apply_segmentation(mask.astype(np.uint8)).astype(bool))


def test_square_crop_is_square_and_random_in_both_directions():
    image = np.arange(40 * 60, dtype=np.float32).reshape(40, 60, 1)
    places = set()
    np.random.seed(0)
    for _ in range(40):
        transform = SquareCrop(30).get_transform(image)
        out = transform.apply_image(image)
        assert out.shape == (30, 30, 1)
        y, x = divmod(int(out[0, 0, 0]), 60)
        places.add((x, y))
        assert np.array_equal(out, image[y : y + 30, x : x + 30])
    xs, ys = np.array(sorted(places)).T
    assert xs.max() > 20 and ys.max() > 6 and abs(np.corrcoef(xs, ys)[0, 1]) < 0.5


def test_small_image_is_padded_right_and_below():
    image = np.ones((10, 20, 3), dtype=np.uint8)
    out = SquareCrop(25).get_transform(image).apply_image(image)
    assert out.shape == (25, 25, 3)
    assert (out[:10, :20] == 1).all() and (out[10:] == 128).all() and (out[:, 20:] == 128).all()


def test_names_and_order(make_cfg):
    def names(is_train, *pairs):
        return [type(a).__name__ for a in build_augmentations(make_cfg([], *pairs), is_train)]

    assert names(True) == ["ResizeShortestEdge", "RandomFlip"]
    assert names(True, "INPUT.CROP.ENABLED", True) == ["RandomCrop", "ResizeShortestEdge", "RandomFlip"]
    assert names(False) == ["ResizeShortestEdge"]
    crop = ("INPUT.AUGMENTATION", "scale_crop")
    assert names(True, *crop) == ["ResizeScale", "SquareCrop", "RandomFlip"]
    assert names(True, *crop, "INPUT.RANDOM_FLIP", "none") == ["ResizeScale", "SquareCrop"]
    assert names(False, *crop) == ["ResizeShortestEdge"]


@pytest.mark.parametrize(("height", "width"), [(30, 50), (50, 30), (7, 7)])
def test_scale_crop_at_test_time_brings_the_long_side_to_size(make_cfg, height, width):
    cfg = make_cfg([], "INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.SIZE", 96)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    (resize,) = build_augmentations(cfg, is_train=False)
    out = resize.get_transform(image).apply_image(image)
    assert max(out.shape[:2]) == 96
    assert min(out.shape[:2]) == round(96 * min(height, width) / max(height, width))


def test_test_resize_by_the_short_edge_beside_scale_crop_training(make_cfg):
    """480 x 640 -> 800 x 1067; 300 x 900 -> 444 x 1333."""
    cfg = make_cfg([], "INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.TEST_RESIZE", "shortest_edge")
    (resize,) = build_augmentations(cfg, is_train=False)
    for image, size in (((480, 640), (800, 1067)), ((300, 900), (444, 1333))):
        transform = resize.get_transform(np.zeros((*image, 3), dtype=np.uint8))
        assert (transform.new_h, transform.new_w) == size


def test_training_scale_is_relative_to_the_fitting_size(make_cfg):
    """Scale 0.5 of a 40x80 image that fits a square of 64 at 32x64 gives 16x32, then padding."""
    cfg = make_cfg(
        [], "INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.SIZE", 64,
        "INPUT.SCALE_CROP.MIN_SCALE", 0.5, "INPUT.SCALE_CROP.MAX_SCALE", 0.5, "INPUT.RANDOM_FLIP", "none",
    )  # fmt: skip
    held = T.AugInput(np.zeros((40, 80, 3), dtype=np.uint8), boxes=np.array([[0.0, 0, 80, 40]]))
    T.AugmentationList(build_augmentations(cfg, is_train=True))(held)
    assert held.image.shape == (64, 64, 3) and held.boxes.tolist() == [[0, 0, 32, 16]]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            ("INPUT.AUGMENTATION", "lsj"),
            "INPUT.AUGMENTATION is 'lsj'; choose one of resize_shortest_edge, scale_crop",
        ),
        (("INPUT.AUGMENTATION", "scale_crop", "INPUT.CROP.ENABLED", True), "has its own crop"),
        (
            ("INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.TEST_RESIZE", "short"),
            "TEST_RESIZE is 'short'; choose one of long_side, square, shortest_edge",
        ),
        (
            ("INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.MIN_SCALE", 3.0),
            "need SIZE >= 1 and 0 < MIN <= MAX",
        ),
        (("INPUT.AUGMENTATION", "scale_crop", "INPUT.RANDOM_FLIP", "both"), "INPUT.RANDOM_FLIP is 'both'"),
    ],
)
def test_bad_keys(make_cfg, pairs, message):
    with pytest.raises(ValueError, match=message):
        build_augmentations(make_cfg([], *pairs), is_train=True)


def test_the_mapper_with_a_cache_gives_what_detectron2_gives(tmp_path, make_cfg):
    """Same image, boxes and masks for the same draws; the record stays as it was, lists and arrays alike."""
    import copy

    from PIL import Image

    from d2_frozen.caching import SLOT, FeatureCache, Store
    from d2_frozen.data.cached_mapper import FrozenDatasetMapper
    from d2_frozen.data.draws import seeded
    from detectron2.data import DatasetMapper
    from detectron2.structures import BoxMode

    pixels = np.random.RandomState(0).randint(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    square = [10.0, 12.0, 50.0, 12.0, 50.0, 40.0, 10.0, 40.0]
    common = {"bbox": [10.0, 12.0, 40.0, 28.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    record = {
        "file_name": str(tmp_path / "a.png"),
        "height": 60,
        "width": 80,
        "image_id": 1,
        "annotations": [
            {**common, "segmentation": [square]},
            {**common, "segmentation": [np.array(square)]},
            {**common, "segmentation": [square], "iscrowd": 1},
        ],
    }
    cfg = make_cfg((), "INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.SIZE", 48)
    settings = dict(image_format="BGR", use_instance_mask=True, recompute_boxes=True)
    plain = DatasetMapper(True, augmentations=build_augmentations(cfg, True), **settings)
    cached = FrozenDatasetMapper(True, augmentations=build_augmentations(cfg, True), **settings)
    cached.cache = FeatureCache(Store(tmp_path / "cache"), "fp32")
    before = copy.deepcopy(record)
    for seed in range(5):
        with seeded(1, seed):
            expected = plain(record)
        with seeded(1, seed):
            got = cached(record)
        assert torch.equal(got["image"], expected["image"]) and got.pop(SLOT).place is None
        assert got.keys() == expected.keys()
        a, b = got["instances"], expected["instances"]
        assert torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor) and torch.equal(a.gt_classes, b.gt_classes)
        assert [[p.tolist() for p in m] for m in a.gt_masks.polygons] == [
            [p.tolist() for p in m] for m in b.gt_masks.polygons
        ]
    assert str(record) == str(before)
