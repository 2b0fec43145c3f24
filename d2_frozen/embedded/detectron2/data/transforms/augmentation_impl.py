"""The augmentations themselves: what is drawn, in which order, from ``numpy.random``.

Sizes are (h, w) and in pixels unless a docstring says otherwise; fractions are in 0..1. The order of
draws is part
of the behaviour: with equal seeds this module and Detectron2's give equal transforms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from fvcore.transforms.transform import (
    BlendTransform,
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    PadTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from PIL import Image

from .augmentation import AugInput, Augmentation, _as_augmentation
from .transform import ExtentTransform, ResizeTransform, RotationTransform

_BILINEAR = Image.Resampling.BILINEAR


class RandomApply(Augmentation):
    """Apply another augmentation or transform with probability ``prob``, else nothing."""

    def __init__(self, tfm_or_aug: Augmentation | Transform, prob: float = 0.5):
        if not 0.0 <= prob <= 1.0:
            raise AssertionError(f"RandomApply: prob is a probability, 0 to 1, not {prob}.")
        self.tfm_or_aug = self.aug = _as_augmentation(tfm_or_aug)
        self.prob = prob

    def _happens(self) -> bool:
        return bool(self._rand_range() < self.prob)

    def get_transform(self, *args) -> Transform:
        return self.aug.get_transform(*args) if self._happens() else NoOpTransform()

    def __call__(self, aug_input: AugInput) -> Transform:
        # The inner augmentation picks its own inputs, so this one must not look at them first.
        return self.aug(aug_input) if self._happens() else NoOpTransform()


class RandomFlip(Augmentation):
    """Mirror the image, along one axis, with probability ``prob``. For both axes use two of them."""

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        if horizontal == vertical:
            raise ValueError(
                "RandomFlip flips along one axis: set either horizontal or vertical, "
                f"not {horizontal=}, {vertical=}."
            )
        self.prob, self.horizontal, self.vertical = prob, horizontal, vertical

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        if not self._rand_range() < self.prob:
            return NoOpTransform()
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)


class Resize(Augmentation):
    """Resize to a fixed size, whatever the aspect ratio.

    Args:
        shape: (h, w), or one number for a square.
    """

    def __init__(self, shape: int | tuple[int, int], interp: int = _BILINEAR):
        self.shape = (shape, shape) if isinstance(shape, int) else tuple(shape)
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        return ResizeTransform(*image.shape[:2], *self.shape, self.interp)


class RandomResize(Augmentation):
    """Resize to one of several (h, w), drawn with equal chances."""

    def __init__(self, shape_list: Sequence[tuple[int, int]], interp: int = _BILINEAR):
        self.shape_list = shape_list
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = self.shape_list[np.random.choice(len(self.shape_list))]
        return ResizeTransform(*image.shape[:2], height, width, self.interp)


class ResizeShortestEdge(Augmentation):
    """Bring the shorter side to a drawn length, keep the aspect ratio, and cap the longer side.

    Args:
        short_edge_length: pixels; lengths to draw from ("choice") or [lowest, highest], both included
            ("range"). A drawn 0 means: leave the image as it is.
        max_size: highest length of the longer side, in pixels.
        sample_style: "range" or "choice".
    """

    # TorchScript looks at the whole class when a scripted function calls get_output_shape; it must not look
    # into the other methods, nor at annotations it has no types for.
    @torch.jit.unused
    def __init__(
        self,
        short_edge_length,
        max_size=2**63 - 1,
        sample_style="range",
        interp=_BILINEAR,
    ):
        # AssertionError, not ValueError, because that is what callers of the original catch.
        if sample_style not in ("range", "choice"):
            raise AssertionError(f"sample_style is 'range' or 'choice', not {sample_style!r}.")
        lengths = (short_edge_length,) * 2 if isinstance(short_edge_length, int) else short_edge_length
        self.is_range = sample_style == "range"
        if self.is_range and len(lengths) != 2:
            raise AssertionError(f"sample_style='range' needs [lowest, highest], not {short_edge_length}.")
        self.short_edge_length = lengths
        self.max_size = max_size
        self.sample_style = sample_style
        self.interp = interp

    @torch.jit.unused
    def _draw_length(self):
        if self.is_range:
            lowest, highest = self.short_edge_length
            return np.random.randint(lowest, highest + 1)
        return np.random.choice(self.short_edge_length)

    @torch.jit.unused
    def get_transform(self, image):
        height, width = image.shape[:2]
        length = self._draw_length()
        if length == 0:
            return NoOpTransform()
        new_height, new_width = self.get_output_shape(height, width, length, self.max_size)
        # A side of 0, which the shape of very long images has, cannot be resized to.
        return ResizeTransform(height, width, max(1, new_height), max(1, new_width), self.interp)

    @staticmethod
    def get_output_shape(oldh: int, oldw: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
        """(h, w) of the result for an input of oldh x oldw; rounded half up. Can be called in TorchScript."""
        short, long = min(oldh, oldw), max(oldh, oldw)
        new_short = float(short_edge_length)
        new_long = new_short / short * long
        if new_long > max_size:
            new_short *= max_size / new_long
            new_long = float(max_size)
        short_px, long_px = int(new_short + 0.5), int(new_long + 0.5)
        return (short_px, long_px) if oldh < oldw else (long_px, short_px)


class ResizeScale(Augmentation):
    """Fit the image into ``scale`` times a target size, keeping the aspect ratio: the first half of
    large-scale jitter.

    Source: Ghiasi et al., "Simple Copy-Paste", arXiv:2012.07177, where scale is 0.1 to 2.

    Args:
        min_scale, max_scale: bounds of the uniformly drawn scale.
        target_height, target_width: pixels.
    """

    def __init__(
        self,
        min_scale: float,
        max_scale: float,
        target_height: int,
        target_width: int,
        interp: int = _BILINEAR,
    ):
        self.min_scale, self.max_scale = min_scale, max_scale
        self.target_height, self.target_width = target_height, target_width
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        scale = np.random.uniform(self.min_scale, self.max_scale)
        size = np.array(image.shape[:2])
        box = np.array([self.target_height, self.target_width]) * scale
        new_height, new_width = (max(1, int(v)) for v in np.round(size * (box / size).min()))
        return ResizeTransform(*image.shape[:2], new_height, new_width, self.interp)


class FixedSizeCrop(Augmentation):
    """Cut a window of fixed size at a drawn place; pad right and below where the image is smaller.

    Args:
        crop_size: (h, w) of the window.
        pad: whether to pad up to ``crop_size``.
        pad_value: of image pixels.
        seg_pad_value: of label maps.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        pad: bool = True,
        pad_value: float = 128.0,
        seg_pad_value: int = 255,
    ):
        self.crop_size = crop_size
        self.pad = pad
        self.pad_value = pad_value
        self.seg_pad_value = seg_pad_value

    def get_transform(self, image: np.ndarray) -> TransformList:
        size = np.array(image.shape[:2])
        window = np.array(self.crop_size)
        # One draw serves both axes, as in the original.
        y0, x0 = np.round(np.maximum(size - window, 0) * np.random.uniform(0.0, 1.0)).astype(int).tolist()
        (h, w), (window_h, window_w) = size.tolist(), window.tolist()
        steps: list[Transform] = [CropTransform(x0, y0, window_w, window_h, w, h)]
        if self.pad:
            missing_h, missing_w = np.maximum(window - size, 0).tolist()
            kept_h, kept_w = np.minimum(size, window).tolist()
            steps.append(
                PadTransform(0, 0, missing_w, missing_h, kept_w, kept_h, self.pad_value, self.seg_pad_value)
            )
        return TransformList(steps)


class RandomCrop(Augmentation):
    """Cut a window of drawn size at a drawn place.

    Args:
        crop_type: how ``crop_size`` is meant, as (h, w):
            "relative": fractions of the image, fixed;
            "relative_range": each side a fraction drawn between the given one and 1;
            "absolute": pixels, fixed;
            "absolute_range": (lowest, highest) pixels, drawn for each side.
            Absolute sizes are capped by the image.
    """

    _TYPES = ("relative_range", "relative", "absolute", "absolute_range")

    def __init__(self, crop_type: str, crop_size: tuple[float, float]):
        if crop_type not in self._TYPES:
            raise AssertionError(f"crop_type is one of {', '.join(self._TYPES)}, not {crop_type!r}.")
        self.crop_type = crop_type
        self.crop_size = crop_size

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Window (h, w) for an image of (h, w); draws twice for the two "range" types."""
        h, w = image_size
        a, b = self.crop_size
        if self.crop_type == "absolute":
            return min(int(a), h), min(int(b), w)
        if self.crop_type == "absolute_range":
            if a > b:
                raise AssertionError(f"absolute_range needs (lowest, highest), not {self.crop_size}.")
            return tuple(np.random.randint(min(side, a), min(side, b) + 1) for side in (h, w))
        fraction_h, fraction_w = a, b
        if self.crop_type == "relative_range":
            lowest = np.asarray(self.crop_size, dtype=np.float32)
            fraction_h, fraction_w = lowest + np.random.rand(2) * (1 - lowest)
        return int(h * fraction_h + 0.5), int(w * fraction_w + 0.5)

    def _draw_window(self, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(x0, y0, w, h); the vertical place is drawn before the horizontal one."""
        crop_h, crop_w = self.get_crop_size(image_size)
        h, w = image_size
        assert crop_h <= h and crop_w <= w, f"a {crop_h}x{crop_w} window does not fit a {h}x{w} image"
        y0 = np.random.randint(h - crop_h + 1)
        x0 = np.random.randint(w - crop_w + 1)
        return x0, y0, crop_w, crop_h

    def get_transform(self, image: np.ndarray) -> Transform:
        return CropTransform(*self._draw_window(image.shape[:2]))


class RandomCrop_CategoryAreaConstraint(Augmentation):
    """A RandomCrop that no single class of the label map may fill.

    Up to ten windows are drawn; the first with at least two classes, none of them above the share, is taken,
    else the tenth.

    Args:
        crop_type, crop_size: as in :class:`RandomCrop`.
        single_category_max_area: highest share of a window for one class; 1 switches the constraint off.
        ignored_category: label that is not counted.
    """

    _TRIES = 10

    def __init__(
        self,
        crop_type: str,
        crop_size: tuple[float, float],
        single_category_max_area: float = 1.0,
        ignored_category: int | None = None,
    ):
        self.crop_aug = RandomCrop(crop_type, crop_size)
        self.crop_type, self.crop_size = crop_type, crop_size
        self.single_category_max_area = single_category_max_area
        self.ignored_category = ignored_category

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None) -> Transform:
        if self.single_category_max_area >= 1.0:
            return self.crop_aug.get_transform(image)
        if sem_seg is None:
            raise ValueError(
                "RandomCrop_CategoryAreaConstraint needs a label map: this input has no sem_seg."
            )
        for _ in range(self._TRIES):
            window = self.crop_aug._draw_window(sem_seg.shape[:2])
            if self._is_mixed(CropTransform(*window).apply_segmentation(sem_seg)):
                break
        return CropTransform(*window)

    def _is_mixed(self, labels: np.ndarray) -> bool:
        classes, areas = np.unique(labels, return_counts=True)
        if self.ignored_category is not None:
            areas = areas[classes != self.ignored_category]
        return len(areas) > 1 and areas.max() < areas.sum() * self.single_category_max_area


class RandomExtent(Augmentation):
    """Cut a rectangle of drawn size around a drawn, shifted centre; it may reach outside the image.

    Args:
        scale_range: (low, high) side length as a fraction of the image's.
        shift_range: (x, y) whole width of the drawn shift, as fractions of the image's size.
    """

    def __init__(self, scale_range: tuple[float, float], shift_range: tuple[float, float]):
        self.scale_range = scale_range
        self.shift_range = shift_range

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        scale = np.random.uniform(self.scale_range[0], self.scale_range[1])
        cx = w * (0.5 + self.shift_range[0] * (np.random.rand() - 0.5))
        cy = h * (0.5 + self.shift_range[1] * (np.random.rand() - 0.5))
        half_w, half_h = 0.5 * w * scale, 0.5 * h * scale
        rectangle = np.array([cx - half_w, cy - half_h, cx + half_w, cy + half_h])
        size = (int(rectangle[3] - rectangle[1]), int(rectangle[2] - rectangle[0]))
        return ExtentTransform(src_rect=tuple(rectangle), output_size=size)


class RandomRotation(Augmentation):
    """Rotate by a drawn angle.

    Args:
        angle: degrees, counter-clockwise: [lowest, highest] ("range") or angles to draw from ("choice");
            one number means exactly this angle.
        expand: grow the canvas so that nothing is cut off.
        center: fractions of the image's (w, h): [[min_x, min_y], [max_x, max_y]] ("range") or points to
            draw from ("choice"); the middle when None.
        sample_style: "range" or "choice".
        interp: OpenCV interpolation.
    """

    def __init__(
        self,
        angle: float | Sequence[float],
        expand: bool = True,
        center: Sequence | None = None,
        sample_style: str = "range",
        interp: int | None = None,
    ):
        if sample_style not in ("range", "choice"):
            raise AssertionError(f"sample_style is 'range' or 'choice', not {sample_style!r}.")
        self.is_range = sample_style == "range"
        self.angle = (angle, angle) if isinstance(angle, int | float) else angle
        self.center = (center, center) if center is not None and np.ndim(center) == 1 else center
        self.expand = expand
        self.sample_style = sample_style
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        angle = np.random.uniform(*self.angle) if self.is_range else np.random.choice(self.angle)
        center = None
        if self.center is not None:
            if self.is_range:
                (low_x, low_y), (high_x, high_y) = self.center
                x, y = np.random.uniform(low_x, high_x), np.random.uniform(low_y, high_y)
            else:
                x, y = self.center[np.random.choice(len(self.center))]
            center = (w * x, h * y)
        if angle % 360 == 0:
            return NoOpTransform()
        return RotationTransform(h, w, angle, expand=self.expand, center=center, interp=self.interp)


class _RandomIntensity(Augmentation):
    """Blend with a reference image: 0 gives the reference, 1 the image, above 1 exaggerates."""

    def __init__(self, intensity_min: float, intensity_max: float):
        self.intensity_min = intensity_min
        self.intensity_max = intensity_max

    def reference(self, image: np.ndarray) -> np.ndarray | float:
        raise NotImplementedError

    def get_transform(self, image: np.ndarray) -> Transform:
        keep = np.random.uniform(self.intensity_min, self.intensity_max)
        return BlendTransform(src_image=self.reference(image), src_weight=1 - keep, dst_weight=keep)


class RandomContrast(_RandomIntensity):
    """Contrast by a factor drawn in intensity_min..intensity_max; 1 changes nothing, 0 leaves the mean
    grey.
    """

    def reference(self, image: np.ndarray) -> float:
        return image.mean()


class RandomBrightness(_RandomIntensity):
    """Brightness by a factor drawn in intensity_min..intensity_max; 1 changes nothing, 0 is black."""

    def reference(self, image: np.ndarray) -> float:
        return 0


class RandomSaturation(_RandomIntensity):
    """Saturation by a factor drawn in intensity_min..intensity_max; 1 changes nothing, 0 is grey. For
    RGB images.
    """

    def reference(self, image: np.ndarray) -> np.ndarray:
        assert image.shape[-1] == 3, f"saturation needs three channels, the image has shape {image.shape}"
        return image.dot([0.299, 0.587, 0.114])[:, :, np.newaxis]  # luma, ITU-R BT.601


class RandomLighting(Augmentation):
    """Add drawn amounts of the principal components of natural colours. For RGB images.

    Source: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", section 4.1.

    Args:
        scale: standard deviation of the three amounts.
    """

    # Columns: principal components of RGB over ImageNet; and the square roots of their variances.
    eigen_vecs = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    eigen_vals = np.array([0.2175, 0.0188, 0.0045])

    def __init__(self, scale: float):
        self.scale = scale

    def get_transform(self, image: np.ndarray) -> Transform:
        assert image.shape[-1] == 3, f"lighting needs three channels, the image has shape {image.shape}"
        amounts = np.random.normal(scale=self.scale, size=3)
        shift = self.eigen_vecs @ (amounts * self.eigen_vals)
        return BlendTransform(src_image=shift, src_weight=1.0, dst_weight=1.0)


class MinIoURandomCrop(Augmentation):
    """Crop so that every box keeps a drawn minimum IoU with the window.

    Source: the sampling of SSD, Liu et al., arXiv:1512.02325, section 2.2.

    Args:
        min_ious: thresholds to draw from, beside "leave the image whole" and "any window".
        min_crop_size: smallest side of a window as a fraction of the image's.
        mode_trials: thresholds to draw at most.
        crop_trials: windows to draw for each of them.
    """

    _WHOLE_IMAGE, _ANY_WINDOW = 1, 0

    def __init__(
        self,
        min_ious: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        min_crop_size: float = 0.3,
        mode_trials: int = 1000,
        crop_trials: int = 50,
    ):
        self.min_ious = min_ious
        self.min_crop_size = min_crop_size
        self.mode_trials = mode_trials
        self.crop_trials = crop_trials

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None) -> Transform:
        if boxes is None:
            raise ValueError("MinIoURandomCrop needs boxes: this input has none.")
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        h, w = image.shape[:2]
        thresholds = (self._WHOLE_IMAGE, *self.min_ious, self._ANY_WINDOW)
        for _ in range(self.mode_trials):
            min_iou = np.random.choice(thresholds)
            if min_iou == self._WHOLE_IMAGE:
                return NoOpTransform()
            for _ in range(self.crop_trials):
                drawn = self._draw_window(h, w)
                if drawn is not None and self._keeps(boxes, drawn[1], min_iou):
                    return drawn[0]
        return NoOpTransform()

    def _draw_window(self, h: int, w: int) -> tuple[CropTransform, tuple[int, int, int, int]] | None:
        """The crop and its XYXY in whole pixels; None where the draw is too narrow, too flat or empty."""
        new_w = np.random.uniform(self.min_crop_size * w, w)
        new_h = np.random.uniform(self.min_crop_size * h, h)
        if not 0.5 <= new_h / new_w <= 2:
            return None
        left = np.random.uniform(w - new_w)
        top = np.random.uniform(h - new_h)
        x0, y0, x1, y1 = int(left), int(top), int(left + new_w), int(top + new_h)
        if x1 <= x0 or y1 <= y0:
            return None
        # The size is rounded by itself, so the crop may be a pixel smaller than the window of the test.
        return CropTransform(x0, y0, int(new_w), int(new_h)), (x0, y0, x1, y1)

    @staticmethod
    def _keeps(boxes: np.ndarray, window: tuple[int, int, int, int], min_iou: float) -> bool:
        """Every box overlaps enough, and at least one has its centre inside."""
        if len(boxes) == 0:
            return True
        x0, y0, x1, y1 = window
        inner_w = np.minimum(boxes[:, 2], x1) - np.maximum(boxes[:, 0], x0)
        inner_h = np.minimum(boxes[:, 3], y1) - np.maximum(boxes[:, 1], y0)
        common = inner_w.clip(min=0) * inner_h.clip(min=0)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        iou = common / np.maximum(areas + (x1 - x0) * (y1 - y0) - common, 1e-12)
        if iou.min() < min_iou:
            return False
        cx, cy = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        return bool(((cx > x0) & (cx < x1) & (cy > y0) & (cy < y1)).any())
