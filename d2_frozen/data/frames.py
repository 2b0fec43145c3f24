"""Can an image be augmented without its pixels? Its size is enough for most augmentations.

They look at the size, draw, and answer with a transform; what a transform does to a size is known for those of fvcore
and Detectron2. So a draw can be replayed, and labels moved along, for an image that nobody has read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from fvcore.transforms.transform import (
    BlendTransform,
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    PadTransform,
    ScaleTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from PIL import Image

from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager

_EXIF_ORIENTATION = 0x0112
_KEEP_SIZE = (
    NoOpTransform,
    HFlipTransform,
    VFlipTransform,
    BlendTransform,
    T.ColorTransform,
    T.PILColorTransform,
)


class PixelsNeeded(Exception):
    """An augmentation looks at pixels, or a transform is not known: the image must be read after all."""


class Frame:
    """Stands for an image (h, w, 3) that is not there. Whoever wants more than its shape gets PixelsNeeded."""

    ndim = 3

    def __init__(self, height: int, width: int) -> None:
        self.shape = (height, width, 3)

    def __getattr__(self, name: str) -> Any:
        raise PixelsNeeded(f"an augmentation asks for .{name} of the image")


def _refuse(name: str) -> Any:
    def method(self: Frame, *args: Any, **kwargs: Any) -> Any:
        raise PixelsNeeded(f"an augmentation uses {name} of the image")

    return method


# Python looks these up on the class, not through __getattr__.
for _name in (
    *("getitem", "len", "iter", "array", "float", "add", "radd", "sub", "rsub", "mul", "rmul"),
    *("truediv", "rtruediv", "lt", "le", "gt", "ge", "eq", "ne"),
):
    setattr(Frame, f"__{_name}__", _refuse(f"__{_name}__"))


class FrameInput(T.AugInput):
    """Detectron2's AugInput with a :class:`Frame` for an image; label maps are moved as ever.

    Args:
        image_hw: height and width in pixels.
        sem_seg: (h, w) label map, or None.
    """

    def __init__(self, image_hw: tuple[int, int], sem_seg: np.ndarray | None = None) -> None:
        self.image = Frame(*image_hw)  # type: ignore[assignment]
        self.boxes = None
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """As AugInput's; PixelsNeeded for a transform that is not known."""
        height, width = size_after(tfm, self.image.shape[:2])
        self.image = Frame(height, width)  # type: ignore[assignment]
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)


def does_as(transform: Transform, kind: type[Transform]) -> bool:
    """Does it to pixels what ``kind`` does? A subclass may do something else."""
    return isinstance(transform, kind) and type(transform).apply_image is kind.apply_image


def size_after(transform: Transform, hw: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image of ``hw`` pixels after a transform.

    Raises:
        PixelsNeeded: the transform is none of fvcore's or Detectron2's that are known here, nor does it as they do.
    """
    height, width = hw
    if isinstance(transform, TransformList):
        for one in transform.transforms:
            height, width = size_after(one, (height, width))
        return height, width
    if any(does_as(transform, kind) for kind in _KEEP_SIZE):
        return height, width
    if does_as(transform, T.ResizeTransform) or does_as(transform, ScaleTransform):
        return transform.new_h, transform.new_w
    if does_as(transform, CropTransform):
        kept_h, kept_w = min(transform.h, height - transform.y0), min(transform.w, width - transform.x0)
        return max(0, kept_h), max(0, kept_w)
    if does_as(transform, PadTransform):
        return height + transform.y0 + transform.y1, width + transform.x0 + transform.x1
    if does_as(transform, T.RotationTransform):
        return transform.bound_h, transform.bound_w
    if does_as(transform, T.ExtentTransform):
        return tuple(transform.output_size)
    raise PixelsNeeded(f"{type(transform).__name__} may change the size of an image in a way not known here")


def image_size(path: str) -> tuple[int, int]:
    """Height and width in pixels from the header of an image file, upright as its EXIF tag says.

    Raises:
        FileNotFoundError: no such file.
        OSError: not an image; names the file.
    """
    with PathManager.open(path, "rb") as stream:
        try:
            with Image.open(stream) as image:
                width, height = image.size
                turned = image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as err:
            raise OSError(f"cannot read the image {path}: {type(err).__name__}: {err}") from err
    return (width, height) if turned else (height, width)
