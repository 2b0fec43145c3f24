"""The short way to augmented pixels leads to the same place as the long one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from d2_frozen.data.draws import seeded
from d2_frozen.data.reading import channels_first, read_augmented, resized_window
from d2_frozen.data.transforms import SquareCrop
from detectron2.data import detection_utils
from detectron2.data import transforms as T


def smooth_picture(height: int, width: int, stretch: float = 1.0) -> np.ndarray:
    """Photo-like: waves of 40 to 70 pixels, times ``stretch``."""
    y, x = np.mgrid[:height, :width] / stretch
    waves = [np.sin(x / a + y / b + c) for a, b, c in ((7, 11, 0), (9, -8, 1), (-6, 10, 2))]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    """What shows the smallest difference in a weight."""
    return np.random.RandomState(height * width).randint(0, 256, (height, width, 3), dtype=np.uint8)


def both_ways(path, image_format, augmentations, seed, fast=False):
    """(short, long) arrays for the same draw."""
    image = detection_utils.read_image(str(path), format=image_format)
    inputs = T.AugInput(image)
    with seeded(1, seed):
        transforms = T.AugmentationList(augmentations)(inputs)
    return read_augmented(str(path), image_format, image.shape[:2], transforms, fast), inputs.image


@pytest.mark.parametrize("interpolation", list(Image.Resampling))
@pytest.mark.parametrize("size", [(131, 97), (20, 31), (90, 61), (300, 260), (1, 1)])
def test_a_window_is_that_of_the_resized_image(size, interpolation):
    """Bit for bit, for each filter, enlarging and reducing, windows at each border and inside."""
    image = Image.fromarray(noise(61, 90))
    width, height = size
    whole = image.resize(size, interpolation)
    for part in range(6):
        left, top = (side * part // 8 for side in size)
        window = (left, top, min(width, left + 1 + width // 3), min(height, top + 1 + height // 3))
        assert resized_window(image, size, window, interpolation).tobytes() == whole.crop(window).tobytes()


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("kind", ["RGB", "L", "RGBA", "P"])
def test_pixels_are_those_of_the_whole_image(tmp_path, kind, image_format):
    """Scales 0.1 to 3, crop before or after the resize or none, flip: bit for bit."""
    path = tmp_path / "a.png"
    Image.fromarray(noise(90, 130)).convert(kind).save(path)
    resize, flip = T.ResizeScale(0.1, 3.0, 100, 100), T.RandomFlip()
    for augmentations in (
        [resize, SquareCrop(100), flip],
        [resize, T.RandomCrop("absolute", (50, 60)), flip],
        [T.RandomCrop("relative_range", (0.3, 0.3)), T.ResizeShortestEdge((40, 90), 150, "range"), flip],
        [T.ResizeShortestEdge((40, 90), 150, "range"), flip],
    ):
        for seed in range(4):
            short, long = both_ways(path, image_format, augmentations, seed)
            assert np.array_equal(short, long)


def test_channels_come_first_whatever_way_the_image_lies():
    image = noise(5, 7)
    for view in (image, image[::-1], image[:, ::-1], image[::-1, ::-1], image[:, ::-1, ::-1], image[1:, :4]):
        planes = channels_first(view)
        assert planes.flags.c_contiguous and np.array_equal(planes, view.transpose(2, 0, 1))
    for other in (image[:, :, :1], image.astype(np.float32)[::-1], image[:0]):
        assert np.array_equal(channels_first(other), other.transpose(2, 0, 1))


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_fast_a_window_of_the_resized_image_is_resized_alone(tmp_path, suffix, image_format):
    """Scales 0.6 to 2 (no reduced decoding): equal, but for one level of 255 in a few pixels of a hundred."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(smooth_picture(90, 130)).save(path)
    augmentations = [T.ResizeScale(0.9, 3.0, 100, 100), SquareCrop(100), T.RandomFlip()]
    for seed in range(8):
        short, long = both_ways(path, image_format, augmentations, seed, fast=True)
        difference = np.abs(short.astype(int) - long.astype(int))
        assert short.shape == long.shape == (100, 100, 3)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.05


@pytest.mark.parametrize("scale", [0.45, 0.2, 0.11])
def test_reduced_decoding_is_close(tmp_path, scale):
    path = tmp_path / "a.jpg"
    Image.fromarray(smooth_picture(400, 600, stretch=4)).save(path, quality=95)
    new_h, new_w = round(400 * scale), round(600 * scale)
    augmentations = [T.Resize((new_h, new_w)), T.RandomCrop("relative", (0.7, 0.7))]
    short, long = both_ways(path, "RGB", augmentations, 3, fast=True)
    assert short.shape == long.shape
    assert np.abs(short.astype(int) - long.astype(int)).mean() < 1.5


def test_other_kinds_take_the_long_way(tmp_path):
    path = tmp_path / "a.jpg"
    picture, exif = Image.fromarray(smooth_picture(40, 60)), Image.Exif()
    picture.save(path)
    resize, flip = T.ResizeTransform(40, 60, 20, 30), T.HFlipTransform(60)

    class Darker(T.ResizeTransform):
        def apply_image(self, image, interp=None):
            return super().apply_image(image, interp) // 2

    assert read_augmented(str(path), "RGB", (40, 60), T.TransformList([resize])) is not None
    assert read_augmented(str(path), "RGB", (40, 60), T.TransformList([flip, resize])) is None
    assert read_augmented(str(path), "RGB", (40, 60), T.TransformList([Darker(40, 60, 20, 30)])) is None
    assert read_augmented(str(path), "RGB", (40, 60), T.TransformList([])) is None
    assert read_augmented(str(path), "L", (40, 60), T.TransformList([resize])) is None
    assert read_augmented(str(path), "RGB", (41, 60), T.TransformList([resize])) is None
    exif[0x0112] = 6
    picture.save(path, exif=exif)
    assert read_augmented(str(path), "RGB", (60, 40), T.TransformList([resize])) is None
    path.write_bytes(b"no image")
    with pytest.raises(OSError, match="cannot read the image .*a.jpg"):
        read_augmented(str(path), "RGB", (40, 60), T.TransformList([resize]))
