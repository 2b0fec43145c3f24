"""Geometry and draws of transforms and augmentations that the golden data does not hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detectron2.data import transforms as T


def test_boxes_follow_the_image_through_resize_and_back():
    """40x80 -> 100x200 scales both axes by 2.5."""
    boxes = np.array([[0.0, 0.0, 80.0, 40.0], [8.0, 4.0, 16.0, 12.0]])
    resize = T.ResizeTransform(h=40, w=80, new_h=100, new_w=200)
    assert np.allclose(resize.apply_box(boxes), boxes * 2.5)
    assert np.allclose(resize.inverse().apply_box(boxes * 2.5), boxes)


def test_rotation_by_90_degrees_is_numpys_rot90():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    turn = T.RotationTransform(4, 6, 90)
    assert np.array_equal(turn.apply_image(image), np.rot90(image))
    # Counter-clockwise: the upper right corner (6, 0) becomes the upper left one, (0, 0) the lower left one.
    assert np.allclose(turn.apply_coords(np.array([[6.0, 0.0], [0.0, 0.0]])), [[0, 0], [0, 6]])


def test_rotation_leads_back():
    turn = T.RotationTransform(40, 60, 33.0)
    points = np.array([[1.0, 2.0], [59.0, 3.0], [30.0, 39.0]])
    # The inverse's canvas is whole pixels, so it may be off by one of them.
    assert np.abs(turn.inverse().apply_coords(turn.apply_coords(points.copy())) - points).max() <= 1


def test_rotation_without_expanding_has_no_inverse():
    with pytest.raises(NotImplementedError):
        T.RotationTransform(40, 60, 33.0, expand=False).inverse()


def test_rotated_boxes_follow_a_flip_and_a_resize():
    """(x, y, w, h, degrees counter-clockwise); 90 degrees put the width along the image's height."""
    boxes = np.array([[10.0, 20.0, 8.0, 4.0, 0.0], [10.0, 20.0, 8.0, 4.0, 90.0]])
    mirrored = T.HFlipTransform(100).apply_rotated_box(boxes.copy())
    assert np.allclose(mirrored, [[90, 20, 8, 4, 0], [90, 20, 8, 4, -90]])
    stretch = T.ResizeTransform(40, 80, 40, 240)  # three times as wide
    assert np.allclose(stretch.apply_rotated_box(boxes.copy()), [[30, 20, 24, 4, 0], [30, 20, 8, 12, 90]])
    # At 45 degrees the height points along (1, 1), which becomes (3, 1): longer by sqrt(5), atan(3) from upright.
    turned = stretch.apply_rotated_box(np.array([[0.0, 0.0, 8.0, 4.0, 45.0]]))
    assert np.allclose(turned, [[0, 0, 8 * 5**0.5, 4 * 5**0.5, np.rad2deg(np.arctan(3))]])


def test_the_resized_shape_can_be_scripted():
    @torch.jit.script
    def area(h: int, w: int) -> int:
        new_h, new_w = T.ResizeShortestEdge.get_output_shape(h, w, 80, 130)
        return new_h * new_w

    assert area(10, 20) == 65 * 130 and area(20, 10) == 130 * 65 and area(10, 10) == 6400


def test_extent_of_a_quarter_is_a_crop_scaled_by_two():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:5, :5] = 200  # one pixel more than the quarter: the filter looks that far
    extent = T.ExtentTransform((0, 0, 4, 4), output_size=(8, 8))
    assert (extent.apply_image(image) == 200).all()
    assert np.allclose(extent.apply_coords(np.array([[4.0, 2.0]])), [[8, 4]])


def test_color_transforms_move_nothing():
    image = np.full((2, 3, 3), 10, np.uint8)
    change = T.ColorTransform(lambda x: x + 5)
    assert (change.apply_image(image) == 15).all()
    assert np.array_equal(change.apply_coords(np.ones((1, 2))), np.ones((1, 2)))
    inverted = T.PILColorTransform(lambda picture: picture.point(lambda v: 255 - v))
    assert (inverted.apply_image(image) == 245).all()
    with pytest.raises(ValueError):
        T.ColorTransform("red")


@pytest.mark.parametrize("make", [T.RandomBrightness, T.RandomContrast, T.RandomSaturation])
def test_intensity_one_changes_nothing_and_zero_leaves_the_reference(make):
    image = np.random.RandomState(0).randint(0, 255, (5, 6, 3)).astype(np.float32)
    unchanged = make(1.0, 1.0).get_transform(image).apply_image(image)
    assert np.allclose(unchanged, image, atol=1e-4)
    grey = make(0.0, 0.0).get_transform(image).apply_image(image)
    expected = {
        T.RandomBrightness: np.zeros_like(image),
        T.RandomContrast: np.full_like(image, image.mean()),
        T.RandomSaturation: np.repeat(image @ np.array([[0.299], [0.587], [0.114]]), 3, axis=2),
    }[make]
    assert np.allclose(grey, expected, atol=1e-3)


def test_min_iou_crop_keeps_its_promise():
    np.random.seed(0)
    image, boxes = np.zeros((60, 80, 3), np.uint8), np.array([[20.0, 20.0, 60.0, 50.0]])
    augmentation = T.MinIoURandomCrop(min_ious=(0.5,), min_crop_size=0.3)
    for _ in range(30):
        crop = augmentation.get_transform(image, boxes)
        height, width = crop.apply_image(image).shape[:2]
        if (height, width) != (60, 80):
            x0, y0, x1, y1 = crop.apply_box(boxes.copy())[0]
            assert 0 < (x0 + x1) / 2 < width + 1 and 0 < (y0 + y1) / 2 < height + 1


def test_min_iou_crop_tries_as_often_as_it_is_told():
    """No window reaches 0.99 with boxes in two corners, and with these seeds none of two has a centre in it."""
    image, boxes = np.zeros((37, 53, 3), np.uint8), np.array([[0.0, 0, 5, 5], [48, 32, 53, 37]])
    augmentation = T.MinIoURandomCrop((0.99,), 0.3, mode_trials=1, crop_trials=2)
    for seed in range(12):
        np.random.seed(seed)
        assert not isinstance(augmentation.get_transform(image, boxes), T.CropTransform)


def test_crop_with_area_constraint_avoids_one_class():
    """Left half class 0, right half class 1: a 10x10 window on the border is mixed, elsewhere it is not."""
    np.random.seed(0)
    labels = np.zeros((20, 40), np.uint8)
    labels[:, 20:] = 1
    image = np.zeros((20, 40, 3), np.uint8)
    augmentation = T.RandomCrop_CategoryAreaConstraint("absolute", (10, 10), single_category_max_area=0.9)
    mixed = [
        len(np.unique(augmentation.get_transform(image, labels).apply_segmentation(labels))) == 2
        for _ in range(20)
    ]
    # Without the constraint 9 of 31 windows are mixed; ten tries make nearly all of them so.
    assert sum(mixed) >= 15


def test_random_apply_0_and_1():
    image = np.zeros((4, 6, 3), np.uint8)
    assert isinstance(T.RandomApply(T.HFlipTransform(6), 1.0)(T.AugInput(image)), T.HFlipTransform)
    assert isinstance(T.RandomApply(T.HFlipTransform(6), 0.0)(T.AugInput(image)), T.NoOpTransform)
    # A transform needs no input, but one may be given.
    assert isinstance(T.RandomApply(T.HFlipTransform(6), 1.0).get_transform(image), T.HFlipTransform)
    for prob in (-0.1, 1.1):
        with pytest.raises(AssertionError):
            T.RandomApply(T.HFlipTransform(6), prob)


def test_an_own_augmentation_sees_the_inputs_it_names():
    class CropToFirstBox(T.Augmentation):
        def get_transform(self, image, boxes):
            x0, y0, x1, y1 = boxes[0].astype(int)
            return T.CropTransform(x0, y0, x1 - x0, y1 - y0)

    held = T.AugInput(np.zeros((20, 30, 3), np.uint8), boxes=np.array([[4.0, 5.0, 14.0, 11.0]]))
    CropToFirstBox()(held)
    assert held.image.shape == (6, 10, 3)
    assert held.boxes.tolist() == [[0, 0, 10, 6]]


def test_equal_seeds_give_equal_augmentations():
    image = np.random.RandomState(0).randint(0, 255, (30, 40, 3)).astype(np.uint8)
    policy = [
        T.RandomApply(T.RandomContrast(0.5, 1.5)),
        T.ResizeScale(0.5, 2.0, 32, 32),
        T.FixedSizeCrop((32, 32)),
        T.RandomRotation([-20, 20]),
        T.RandomFlip(),
    ]
    results = []
    for _ in range(2):
        np.random.seed(11)
        results.append([T.apply_augmentations(policy, image.copy())[0] for _ in range(3)])
    for first, second in zip(*results):
        assert np.array_equal(first, second)


@pytest.mark.parametrize(
    "get_transform",
    [
        lambda self, image: T.HFlipTransform(image.shape[1]),
        lambda self, img: T.HFlipTransform(img.shape[1]),
        lambda self, frame: T.HFlipTransform(frame.shape[1]),
    ],
)
def test_a_single_parameter_is_the_image_whatever_its_name(get_transform):
    Mirror = type("Mirror", (T.Augmentation,), {"get_transform": get_transform})
    held = T.AugInput(np.arange(12, dtype=np.uint8).reshape(3, 4), boxes=np.array([[0.0, 0, 1, 1]]))
    Mirror()(held)
    assert held.image[0].tolist() == [3, 2, 1, 0] and held.boxes.tolist() == [[3, 0, 4, 1]]
