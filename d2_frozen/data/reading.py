"""Pixels of an image after a drawn augmentation, without work on those that the augmentation drops.

Of the resized image, little more is computed than the window that a crop keeps. The result is that of Detectron2, which
resizes whole images, bit for bit: a resize goes along the rows, then along the columns, and rows do not know of each
other, nor do columns.

With INPUT.FAST_READING a JPEG that is made less than half as large is also decoded at 1/2, 1/4 or 1/8 of its size, and
nothing outside of the window is computed; docs/own_data.md says how pixels then differ.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from fvcore.transforms.transform import CropTransform, NoOpTransform, Transform, TransformList
from PIL import Image, UnidentifiedImageError

from d2_frozen.data.frames import does_as
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager

_EXIF_ORIENTATION = 0x0112
_CHANNELS = {"RGB": slice(None), "BGR": slice(None, None, -1)}
# Pixels on each side that a filter of PIL looks at when it enlarges: Lanczos 3, the magic kernel of Pillow 13 4.5.
_REACH = 5


def read_augmented(
    path: str, image_format: str, image_hw: tuple[int, int], transforms: TransformList, fast: bool = False
) -> np.ndarray | None:
    """``transforms.apply_image(read_image(path, image_format))``, where there is a shorter way.

    Args:
        image_format: "RGB" or "BGR".
        image_hw: height and width of the file's image in pixels.
        transforms: a crop or none, a resize, a crop or none; then anything.
        fast: see the top of the file.
    Returns:
        (h, w, 3) uint8; None where the file or the transforms are of another kind, or not as large as promised.
    Raises:
        FileNotFoundError: no such file.
        OSError: the file is no image or is damaged; names the file.
    """
    steps = [step for step in _flat(transforms) if not does_as(step, NoOpTransform)]
    before = steps.pop(0) if steps and does_as(steps[0], CropTransform) else None
    if not steps or not does_as(steps[0], T.ResizeTransform) or image_format not in _CHANNELS:
        return None
    resize: Any = steps.pop(0)
    crop = steps.pop(0) if steps and does_as(steps[0], CropTransform) else None
    with PathManager.open(path, "rb") as stream:
        try:
            with Image.open(stream) as image:
                turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
                if turned or (image.height, image.width) != tuple(image_hw):
                    return None
                if fast and before is None and image.format == "JPEG" and image.mode == "RGB":
                    # Never smaller than what is wanted.
                    image.draft("RGB", (resize.new_w, resize.new_h))
                whole = image.convert("RGB")
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as err:
            kind = UnidentifiedImageError if isinstance(err, UnidentifiedImageError) else OSError
            raise kind(f"cannot read the image {path}: {type(err).__name__}: {err}") from err
    if before is not None:
        whole = whole.crop(_window(before, whole.width, whole.height))
    size = (resize.new_w, resize.new_h)
    window = (0, 0, *size) if crop is None else _window(crop, *size)
    resized = (_window_alone if fast else resized_window)(whole, size, window, resize.interp)
    pixels = np.asarray(resized)[:, :, _CHANNELS[image_format]]
    for step in steps:
        pixels = step.apply_image(pixels)
    return pixels


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """(h, w, C) -> (C, h, w), contiguous. Quick for photos, also where flips and swaps left negative strides."""
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3 or not pixels.size:
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    turned = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in pixels.strides)
    planes = np.empty((3, *pixels.shape[:2]), dtype=np.uint8)
    # In the order in which they lie in memory; turning them back is quicker plane by plane.
    cv2.split(np.ascontiguousarray(pixels[turned]), list(planes[turned[2]]))
    down, across = (part.step == -1 for part in turned[:2])
    if down or across:
        for plane in planes:
            cv2.flip(plane, -1 if down and across else int(across), dst=plane)
    return planes


def resized_window(
    image: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int], interpolation: int
) -> Image.Image:
    """``image.resize(size, interpolation).crop(window)``, bit for bit.

    Args:
        size: width, height in pixels.
        window: left, top, right, bottom in the resized image.
    """
    width, height = size
    left, top, right, bottom = window
    if window == (0, 0, width, height) or interpolation == Image.Resampling.NEAREST:
        return image.resize(size, interpolation).crop(window)
    down = image.height / height
    reach = _REACH * max(1.0, down) + 1
    first = max(0, math.floor((top + 0.5) * down - reach))
    last = min(image.height, math.ceil((bottom - 0.5) * down + reach))
    # Along the rows: only those that the window looks at. Along the columns: only those in the window, in their place.
    strip = image.crop((0, first, image.width, last)).resize((width, last - first), interpolation)
    columns = Image.new(image.mode, (right - left, image.height))
    columns.paste(strip.crop((left, 0, right, last - first)), (0, first))
    return columns.resize((right - left, height), interpolation).crop((0, top, right - left, bottom))


def _window_alone(
    image: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int], interpolation: int
) -> Image.Image:
    """As ``resized_window``, but for rounding: PIL keeps the corners of a box in 32 bits."""
    across, down = image.width / size[0], image.height / size[1]
    left, top, right, bottom = window
    # Of a box, PIL takes the same weighted pixels as for the whole image, also those beyond its border.
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    return image.resize((right - left, bottom - top), interpolation, box=box)


def _window(crop: Any, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop in an image of this size; an array is cut off at its end too."""
    return crop.x0, crop.y0, min(width, crop.x0 + crop.w), min(height, crop.y0 + crop.h)


def _flat(transform: Transform) -> Any:
    if isinstance(transform, TransformList):
        for one in transform.transforms:
            yield from _flat(one)
    else:
        yield transform
