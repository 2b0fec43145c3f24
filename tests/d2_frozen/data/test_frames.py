"""An augmentation that is drawn without pixels is the one that would have been drawn with them."""

from __future__ import annotations

import numpy as np
import pytest
from fvcore.transforms.transform import CropTransform, PadTransform, TransformList, VFlipTransform
from PIL import Image

from d2_frozen.caching.keys import canonical
from d2_frozen.data.draws import seeded
from d2_frozen.data.frames import Frame, FrameInput, PixelsNeeded, image_size, size_after
from d2_frozen.data.transforms import SquareCrop
from detectron2.data import transforms as T

AUGMENTATIONS = [
    [T.ResizeScale(0.1, 2.0, 64, 64), SquareCrop(64), T.RandomFlip()],
    [T.ResizeShortestEdge((30, 60), 70), T.RandomCrop("relative_range", (0.3, 0.3)), T.RandomFlip()],
    [T.RandomCrop_CategoryAreaConstraint("absolute", (20, 20), 0.6, 255)],
    [T.ResizeScale(0.5, 2.0, 64, 64), T.FixedSizeCrop((48, 80))],
    [T.RandomRotation([-40, 40]), T.RandomExtent((0.5, 1.5), (0.2, 0.2))],
    [T.RandomBrightness(0.5, 1.5), T.RandomLighting(0.1), T.RandomApply(T.RandomFlip(), 0.5)],
]


@pytest.mark.parametrize("augmentations", AUGMENTATIONS, ids=lambda a: type(a[0]).__name__)
@pytest.mark.parametrize("seed", range(4))
def test_draws_sizes_and_labels_are_those_with_pixels(augmentations: list, seed: int) -> None:
    height, width = ((40, 70), (70, 40))[seed % 2]
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    labels = np.random.RandomState(seed).randint(0, 5, (height, width)).astype(np.uint8)
    every = T.AugmentationList(augmentations)
    with_pixels, without = T.AugInput(pixels, sem_seg=labels), FrameInput((height, width), labels)
    with seeded(3, seed):
        expected = every(with_pixels)
    with seeded(3, seed):
        drawn = every(without)
    assert canonical(drawn) == canonical(expected)
    assert tuple(without.image.shape) == with_pixels.image.shape
    assert np.array_equal(without.sem_seg, with_pixels.sem_seg)
    assert np.array_equal(drawn.apply_image(pixels), with_pixels.image)


def test_who_looks_at_pixels_is_told() -> None:
    class Peeks(T.Augmentation):
        def get_transform(self, image: np.ndarray) -> T.Transform:
            return T.NoOpTransform() if image[0, 0, 0] > 9 else T.HFlipTransform(image.shape[1])

    for augmentation in (Peeks(), T.RandomContrast(0.5, 1.5), T.RandomSaturation(0.5, 1.5)):
        with pytest.raises(PixelsNeeded):
            augmentation(FrameInput((4, 6)))
    frame = Frame(4, 6)
    for look in (np.asarray, len, lambda f: f + 1, lambda f: 255 - f, lambda f: f.dtype, list):
        with pytest.raises(PixelsNeeded):
            look(frame)

    class Unknown(T.Transform):
        def apply_image(self, img: np.ndarray) -> np.ndarray:
            return img[::2]

        def apply_coords(self, coords: np.ndarray) -> np.ndarray:
            return coords

    with pytest.raises(PixelsNeeded, match="Unknown"):
        size_after(Unknown(), (3, 4))


def test_sizes() -> None:
    steps = TransformList(
        [
            CropTransform(5, 2, 30, 30),
            PadTransform(1, 2, 3, 4),
            VFlipTransform(10),
            T.ResizeTransform(9, 9, 7, 8),
        ]
    )
    assert size_after(TransformList(steps.transforms[:1]), (12, 20)) == (10, 15)  # a window beyond the border
    assert size_after(TransformList(steps.transforms[:3]), (12, 20)) == (16, 19)
    assert size_after(steps, (12, 20)) == (7, 8)


def test_size_from_the_header_is_that_of_the_upright_image(tmp_path) -> None:
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")
    assert image_size(str(tmp_path / "turned.jpg")) == (30, 20)
    assert image_size(str(tmp_path / "plain.jpg")) == (20, 30)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(OSError, match="broken.jpg"):
        image_size(str(tmp_path / "broken.jpg"))
