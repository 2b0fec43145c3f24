"""Where in the picture is a clip cut out? The same rectangle for all of its frames.

Training: one crop, at random. Testing: one to N crops, spread evenly along the longer side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from video_app.clips.reader import resize

KINDS = ("random_resized", "multi_scale", "random", "centre")


@dataclass(frozen=True)
class Crop:
    """Rectangle in pixels; ``flip`` mirrors left and right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    def of(self, frames: np.ndarray, size_px: int) -> np.ndarray:
        """(T, H, W, 3) uint8 -> (T, size_px, size_px, 3)."""
        cut = frames[:, self.top : self.top + self.height, self.left : self.left + self.width]
        if self.flip:
            cut = cut[:, :, ::-1]
        return np.stack([resize(np.ascontiguousarray(frame), size_px, size_px) for frame in cut])


@dataclass(frozen=True)
class TrainCrop:
    """Draws a crop.

    Args:
        kind: of ``KINDS``, see VIDEO.TRAIN_CROP.
        size_px: side of the square that comes out; the crop itself of "random" and "centre", if it fits.
        area, aspect: from and to, for "random_resized" (GoogLeNet, arXiv:1409.4842): share of the area, width / height.
        scales: for "multi_scale" (TSN, arXiv:1608.00859): side of the square over the shorter side.
        flip: mirror half of the clips.
    Raises:
        ValueError: unknown kind or a range that is not one.
    """

    kind: str
    size_px: int
    area: tuple[float, float] = (0.4, 1.0)
    aspect: tuple[float, float] = (0.75, 4.0 / 3.0)
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"VIDEO.TRAIN_CROP is {self.kind!r}; choose {', '.join(KINDS)}.")
        if not (0 < self.area[0] <= self.area[1] <= 1 and 0 < self.aspect[0] <= self.aspect[1]):
            raise ValueError(
                f"VIDEO.CROP_AREA {self.area} and CROP_ASPECT {self.aspect}: 0 < from <= to, areas <= 1."
            )
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales) or self.size_px < 1:
            raise ValueError(
                f"VIDEO.CROP_SCALES {self.scales} are in (0, 1], CROP_SIZE {self.size_px} is above 0."
            )

    def draw(self, height: int, width: int, random: np.random.Generator) -> Crop:
        """A crop inside a picture of this size. The number of values drawn may depend on the size."""
        flip = bool(self.flip and random.random() < 0.5)
        if self.kind == "random_resized":
            return self._resized(height, width, random, flip)
        if self.kind == "multi_scale":
            side = max(1, round(float(random.choice(self.scales)) * min(height, width)))
            down, right = ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1))[int(random.integers(5))]
            return Crop(round(down * (height - side)), round(right * (width - side)), side, side, flip)
        side = min(self.size_px, height, width)
        if self.kind == "centre":
            return Crop((height - side) // 2, (width - side) // 2, side, side, flip)
        top, left = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
        return Crop(top, left, side, side, flip)

    def _resized(self, height: int, width: int, random: np.random.Generator, flip: bool) -> Crop:
        for _ in range(10):
            area = random.uniform(*self.area) * height * width
            aspect = math.exp(random.uniform(*np.log(self.aspect)))
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
                return Crop(top, left, h, w, flip)
        # No rectangle fits a very long picture: the largest in the middle whose aspect ratio is allowed.
        aspect = min(max(width / height, self.aspect[0]), self.aspect[1])
        h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
        return Crop((height - h) // 2, (width - w) // 2, max(1, h), max(1, w), flip)


def view_crops(height: int, width: int, count: int, size_px: int) -> Sequence[Crop]:
    """Squares of ``size_px``, of the shorter side where that is less, in its middle.

    Along the longer side ``count`` from end to end, the middle one if 1.
    """
    if count < 1:
        raise ValueError(f"VIDEO.TEST.CROPS is {count}; it must be at least 1.")
    side = min(size_px, height, width)
    across, along = min(height, width) - side, max(height, width) - side
    offsets = [round(along * i / (count - 1)) for i in range(count)] if count > 1 else [along // 2]
    middle = across // 2
    return [Crop(o, middle, side, side) if height > width else Crop(middle, o, side, side) for o in offsets]
