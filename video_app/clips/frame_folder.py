"""A folder of pictures as a clip: names in natural order (img_2 before img_10), shown at a fixed rate."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import cv2
import numpy as np

from video_app.clips.reader import Clip, ClipError, checked, resize, resize_short_side

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class FrameFolder(Clip):
    """Pictures of other sizes than the first are resized to it."""

    reader = "folder"

    def __init__(self, path: str, fps: float):
        self._paths = [os.path.join(path, name) for name in picture_names(path)]
        if not self._paths:
            raise ClipError(f"no pictures in the folder ({', '.join(PICTURES)})")
        self.times_s = np.arange(len(self._paths)) / fps

    def read(self, indices: Sequence[int], short_side_px: int = 0) -> np.ndarray:
        asked = checked(indices, len(self))
        pictures: dict[int, np.ndarray] = {}
        for index in dict.fromkeys(asked):
            # imdecode, since imread cannot open every path.
            data = np.fromfile(self._paths[index], np.uint8)
            picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
            if picture is None:
                raise ClipError(f"{os.path.basename(self._paths[index])} is not a picture")
            picture = resize_short_side(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), short_side_px)
            first = next(iter(pictures.values()), picture)
            pictures[index] = resize(picture, *first.shape[:2])
        return np.stack([pictures[index] for index in asked])

    def close(self) -> None:
        pass  # pictures are opened one by one


def picture_names(folder: str) -> list[str]:
    names = (entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(PICTURES))
    return sorted((name for name in names if not name.startswith(".")), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Runs of digits compare as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
