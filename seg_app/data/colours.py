"""Colour jitter of training images: brightness, contrast, saturation, hue.

Source: SSD, arXiv 1512.02325 (its released training code has the ranges); used by Mask2Former on ADE20K.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from detectron2.data import transforms as T

_BRIGHTNESS = 32  # of 255, either way
_FACTOR = (0.5, 1.5)  # of contrast and saturation
_HUE = 18  # of OpenCV's 180 steps around the circle, either way
_LEVELS = np.arange(256, dtype=np.uint8)


class ColorJitter(T.Augmentation):
    """Each of the four changes happens with probability 1/2; contrast comes before or after saturation and hue.

    Args:
        image_format: order of the channels, "RGB" or "BGR".
    """

    def __init__(self, image_format: str) -> None:
        super().__init__()
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.COLOR_AUG_SSD wants INPUT.FORMAT RGB or BGR, not {image_format!r}.")
        self.image_format = image_format

    def get_transform(self, image: np.ndarray) -> T.Transform:
        brightness = _maybe(np.random.uniform(-_BRIGHTNESS, _BRIGHTNESS), 0.0)
        contrast, saturation = (_maybe(np.random.uniform(*_FACTOR), 1.0) for _ in range(2))
        hue = int(_maybe(np.random.randint(-_HUE, _HUE + 1), 0))
        late = np.random.rand() < 0.5
        change = ColorChange(brightness, contrast, saturation, hue, late, self.image_format == "RGB")
        return T.ColorTransform(change)


def _maybe(value: float, neutral: float) -> float:
    return value if np.random.rand() < 0.5 else neutral


@dataclass(frozen=True)
class ColorChange:
    """One drawn change: call it on an (H, W, 3) uint8 image.

    brightness: added; contrast: factor; saturation: factor in HSV; hue: steps of 2 degrees; contrast_last: contrast
    after saturation and hue; rgb: order of channels, else BGR.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: int = 0
    contrast_last: bool = False
    rgb: bool = True

    def __call__(self, image: np.ndarray) -> np.ndarray:
        image = _linear(image, 1.0, self.brightness)
        if not self.contrast_last:
            image = _linear(image, self.contrast, 0.0)
        image = self._in_hsv(image)
        return _linear(image, self.contrast, 0.0) if self.contrast_last else image

    def _in_hsv(self, image: np.ndarray) -> np.ndarray:
        if self.saturation == 1.0 and self.hue == 0:
            return image
        there = cv2.COLOR_RGB2HSV if self.rgb else cv2.COLOR_BGR2HSV
        back = cv2.COLOR_HSV2RGB if self.rgb else cv2.COLOR_HSV2BGR
        hsv = cv2.cvtColor(np.ascontiguousarray(image), there)
        hue = ((_LEVELS.astype(np.int16) + self.hue) % 180).astype(np.uint8)
        saturation = _linear_levels(self.saturation, 0.0)
        return cv2.cvtColor(cv2.LUT(hsv, np.stack([hue, saturation, _LEVELS], axis=-1)[None]), back)


def _linear(pixels: np.ndarray, factor: float, offset: float) -> np.ndarray:
    if factor == 1.0 and offset == 0.0:
        return pixels
    return cv2.LUT(np.ascontiguousarray(pixels), _linear_levels(factor, offset))


def _linear_levels(factor: float, offset: float) -> np.ndarray:
    """What each of the 256 levels becomes: looking it up is quicker than computing it for each pixel."""
    return (_LEVELS.astype(np.float32) * factor + offset).clip(0, 255).astype(np.uint8)
