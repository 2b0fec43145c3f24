"""Pixels of an image after a drawn augmentation, without work on those that the augmentation drops.

A JPEG that is made less than half as large is decoded at 1/2, 1/4 or 1/8 of its size, and of the resized image only
the window that a crop keeps is computed. Detectron2 decodes and resizes whole images; docs/own_data.md says how pixels
differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from fvcore.transforms.transform import CropTransform, Transform, TransformList
from PIL import Image, UnidentifiedImageError

from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager

_EXIF_ORIENTATION = 0x0112
_CHANNELS = {"RGB": slice(None), "BGR": slice(None, None, -1)}


def read_augmented(
    path: str, image_format: str, image_hw: tuple[int, int], transforms: TransformList
) -> np.ndarray | None:
    """``transforms.apply_image(read_image(path, image_format))``, where there is a shorter way to much the same pixels.

    Args:
        image_format: "RGB" or "BGR".
        image_hw: height and width of the file's image in pixels.
        transforms: a resize first, with a crop behind it or not; then anything.
    Returns:
        (h, w, 3) uint8; None where the file or the transforms are of another kind, or not as large as promised.
    Raises:
        FileNotFoundError: no such file.
        OSError: the file is no image or is damaged; names the file.
    """
    steps = list(_flat(transforms))
    resize = steps[0] if steps else None
    if not isinstance(resize, T.ResizeTransform) or image_format not in _CHANNELS:
        return None
    crop = steps[1] if len(steps) > 1 and isinstance(steps[1], CropTransform) else None
    with PathManager.open(path, "rb") as stream:
        try:
            with Image.open(stream) as image:
                turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
                if turned or (image.height, image.width) != tuple(image_hw):
                    return None
                if image.format == "JPEG" and image.mode == "RGB":
                    # Never smaller than what is wanted.
                    image.draft("RGB", (resize.new_w, resize.new_h))
                pixels = _resized_window(image.convert("RGB"), resize, crop)
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as err:
            kind = UnidentifiedImageError if isinstance(err, UnidentifiedImageError) else OSError
            raise kind(f"cannot read the image {path}: {type(err).__name__}: {err}") from err
    pixels = pixels[:, :, _CHANNELS[image_format]]
    for step in steps[2 if crop is not None else 1 :]:
        pixels = step.apply_image(pixels)
    return pixels


def _resized_window(image: Image.Image, resize: Any, crop: CropTransform | None) -> np.ndarray:
    """The window of ``crop`` in the image resized to (new_h, new_w); all of it without a crop."""
    width, height = resize.new_w, resize.new_h
    x0, y0, x1, y1 = 0, 0, width, height
    if crop is not None:
        x0, y0 = crop.x0, crop.y0
        x1, y1 = min(width, x0 + crop.w), min(height, y0 + crop.h)
    across, down = image.width / width, image.height / height
    # Of a box, PIL takes the same weighted pixels as for the whole image, also those beyond its border.
    box = (x0 * across, y0 * down, min(x1 * across, image.width), min(y1 * down, image.height))
    return np.asarray(image.resize((x1 - x0, y1 - y0), resize.interp, box=box))


def _flat(transform: Transform) -> Any:
    if isinstance(transform, TransformList):
        for one in transform.transforms:
            yield from _flat(one)
    else:
        yield transform
