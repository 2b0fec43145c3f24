"""Each change of colours does what its name says, in 0..255."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from seg_app.data.colours import ColorChange, ColorJitter

PIXELS = np.uint8([[[200, 100, 50], [10, 20, 30]]])


def test_nothing_drawn_changes_nothing() -> None:
    assert (ColorChange()(PIXELS) == PIXELS).all()


def test_brightness_is_added_and_contrast_multiplied_within_0_and_255() -> None:
    assert ColorChange(brightness=60)(PIXELS).tolist() == [[[255, 160, 110], [70, 80, 90]]]
    assert ColorChange(contrast=1.5)(PIXELS).tolist() == [[[255, 150, 75], [15, 30, 45]]]


def test_no_saturation_is_grey() -> None:
    grey = ColorChange(saturation=0.0)(PIXELS)
    assert (grey == grey[..., :1]).all()


def test_a_third_of_the_circle_turns_red_into_green() -> None:
    red = np.uint8([[[255, 0, 0]]])
    assert ColorChange(hue=60)(red).tolist() == [[[0, 255, 0]]]
    assert ColorChange(hue=60, rgb=False)(red[..., ::-1]).tolist() == [[[0, 255, 0]]]


@pytest.mark.parametrize("rgb", [True, False])
def test_every_level_is_what_arithmetic_says(rgb: bool) -> None:
    """The looked-up levels against float arithmetic on each pixel, for 40 draws of all changes."""

    def computed(pixels: np.ndarray, factor: float, offset: float) -> np.ndarray:
        return (pixels.astype(np.float32) * factor + offset).clip(0, 255).astype(np.uint8)

    random = np.random.RandomState(0)
    image = random.randint(0, 256, (30, 40, 3)).astype(np.uint8)
    there, back = (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB) if rgb else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
    for _ in range(40):
        brightness, contrast, saturation = (
            random.uniform(-32, 32),
            random.uniform(0.5, 1.5),
            random.uniform(0.5, 1.5),
        )
        hue = int(random.randint(-18, 18))
        hsv = cv2.cvtColor(computed(computed(image, 1.0, brightness), contrast, 0.0), there)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + hue) % 180
        hsv[..., 1] = computed(hsv[..., 1], saturation, 0.0)
        change = ColorChange(brightness, contrast, saturation, hue, contrast_last=False, rgb=rgb)
        assert np.array_equal(change(image), cv2.cvtColor(hsv, back))


def test_draws_repeat_and_transform_is_fixed() -> None:
    image = np.random.RandomState(0).randint(0, 255, (5, 6, 3)).astype(np.uint8)
    np.random.seed(3)
    first = ColorJitter("RGB").get_transform(image)
    np.random.seed(3)
    second = ColorJitter("RGB").get_transform(image)
    assert (first.apply_image(image) == second.apply_image(image)).all()
    assert first.apply_segmentation(image[..., 0]) is not None
    with pytest.raises(ValueError, match="INPUT.FORMAT"):
        ColorJitter("L")


def test_hue_turns_as_far_either_way() -> None:
    """Up to 18 steps both ways, each as often as the other: the colours of a set stay on average what they are."""
    np.random.seed(0)
    image = np.zeros((1, 1, 3), np.uint8)
    hues = [ColorJitter("RGB").get_transform(image).op.hue for _ in range(2000)]
    assert (min(hues), max(hues)) == (-18, 18)
