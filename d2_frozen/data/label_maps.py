"""A file with one class id per pixel -> an array. Ids are 8 or 16 bits wide, palettes are looked through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from detectron2.utils.file_io import PathManager

# PIL's names for one number per pixel; P is an index into a palette, which is what is wanted.
ID_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I")
_HIGHEST = 65535


class LabelMapError(ValueError):
    """A file is no label map; ``kind`` in words that are equal for equal faults, ``seen`` with the file's name."""

    def __init__(self, kind: str, seen: str) -> None:
        self.kind, self.seen = kind, seen
        super().__init__(f"{kind} ({seen})")

    def __reduce__(self):
        return type(self), (self.kind, self.seen)


def read_label_map(
    path: str, label_values: Sequence[int] | None = None, ignore_label: int = 255
) -> np.ndarray:
    """
    Args:
        path: of a PNG or another lossless image.
        label_values: the number that stands in the file for each class, in the order of classes; all other numbers
            become ``ignore_label``. None: the file holds class ids. Black and white of one bit are 0 and 1, or 0 and
            255 where 255 stands here, and 1 does not.
    Returns:
        (H, W) integers, 0..65535.
    Raises:
        LabelMapError: the file holds colours instead of ids, or larger numbers; it is cut, damaged, or no image.
        FileNotFoundError: no such file.
    """
    with PathManager.open(path, "rb") as file:
        try:
            with Image.open(file) as image:
                check_id_mode(path, image.mode)
                numbers = np.array(image)
        except (OSError, SyntaxError, EOFError) as err:  # PIL does not name the file
            raise LabelMapError("broken label map", f"{path}: {err}") from err
    if numbers.dtype == bool:
        # White of a PNG of one bit is 1, but looks as 255 does: the one that label_values has is meant.
        white = 255 if label_values is not None and 255 in label_values and 1 not in label_values else 1
        numbers = np.where(numbers, np.uint8(white), np.uint8(0))
    lowest, highest = int(numbers.min(initial=0)), int(numbers.max(initial=0))
    if lowest < 0 or highest > _HIGHEST:
        raise LabelMapError(
            "label map holds numbers that are no ids",
            f"{path} has {lowest} to {highest}; 0 to {_HIGHEST} is possible",
        )
    return numbers if label_values is None else _as_classes(numbers, label_values, ignore_label)


def check_id_mode(path: str, mode: str) -> None:
    """Has an image of this PIL mode one number per pixel?

    Raises:
        LabelMapError: it has not.
    """
    if mode not in ID_MODES:
        raise LabelMapError(
            "label map holds colours instead of class ids",
            f"{path} is {mode}; one channel of 8 or 16 bits is wanted, with the number of its class at each pixel",
        )


def check_map_size(path: str, size: tuple[int, int], shown: tuple[Any, Any], why: str = "") -> None:
    """
    Args:
        path: of the label map.
        size: its (width, height).
        shown: that of the image as the user sees it.
        why: what the error says behind the image's size.
    Raises:
        LabelMapError: they differ.
    """
    if size != shown:
        raise LabelMapError(
            "label map and image differ in size",
            f"{path} is {size[0]}x{size[1]}, the image {shown[0]}x{shown[1]}{why}",
        )


def check_map_values(path: str, present: Sequence[int], classes: int, ignored: int, allowed: str) -> None:
    """
    Args:
        present: the values that occur in the label map of this path.
        classes: ids 0 to classes - 1 are right, and ``ignored``.
        allowed: words for that.
    Raises:
        LabelMapError: another value occurs.
    """
    wrong = [value for value in present if value != ignored and not 0 <= value < classes]
    if wrong:
        raise LabelMapError(
            "label value out of range", f"{path} has {', '.join(map(str, wrong[:5]))}; {allowed}"
        )


def resizable(numbers: np.ndarray, ignored: int = 255) -> np.ndarray:
    """A label map in the type in which Detectron2 resizes it: 8 bits by pixel centres, larger numbers as float32.

    Args:
        ignored: what padding puts beside them; the type holds it too.
    """
    small = numbers.max(initial=0) <= 255 and 0 <= ignored <= 255
    return numbers.astype(np.uint8 if small else np.float32)


def _as_classes(numbers: np.ndarray, label_values: Sequence[int], ignore_label: int) -> np.ndarray:
    class_of = np.full(_HIGHEST + 1, ignore_label, dtype=np.int32)
    class_of[list(label_values)] = np.arange(len(label_values))
    return class_of[numbers]
