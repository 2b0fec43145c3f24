"""Which augmentations does a config ask for?

"resize_shortest_edge": Detectron2's own, by INPUT.MIN_SIZE_*, MAX_SIZE_*, RANDOM_FLIP and CROP.
"scale_crop": Lin et al., arXiv:2211.02043, section 3.3: random resize, then a random square crop; it is the
large-scale jittering of Simple Copy-Paste, arXiv:2012.07177.
"""

from __future__ import annotations

import numpy as np

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T

AUGMENTATIONS = ("resize_shortest_edge", "scale_crop")
TEST_RESIZES = ("long_side", "square", "shortest_edge")


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Augmentations for INPUT.AUGMENTATION, in the order in which they run.

    Raises:
        ValueError: no such augmentation, sizes out of range, or keys that contradict each other.
    """
    kind = cfg.INPUT.AUGMENTATION
    if kind == "resize_shortest_edge":
        augmentations = detection_utils.build_augmentation(cfg, is_train)
        if is_train and cfg.INPUT.CROP.ENABLED:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        return augmentations
    if kind != "scale_crop":
        raise ValueError(f"INPUT.AUGMENTATION is {kind!r}; choose one of {', '.join(AUGMENTATIONS)}.")
    if cfg.INPUT.CROP.ENABLED:
        raise ValueError("INPUT.CROP.ENABLED is True, but INPUT.AUGMENTATION scale_crop has its own crop.")
    return _scale_crop(cfg, is_train)


def changes_frame(cfg: CfgNode) -> bool:
    """Can training augmentation cut objects, so that boxes are better taken from the cut masks?"""
    return cfg.INPUT.AUGMENTATION == "scale_crop" or cfg.INPUT.CROP.ENABLED


def padded_square(cfg: CfgNode) -> int:
    """Side in pixels of the square to which a model pads the images it gets; 0 if it does not.

    Not an augmentation: padding is no part of an image, so that boxes are scaled back by the size without it.
    """
    wanted = cfg.INPUT.AUGMENTATION == "scale_crop" and cfg.INPUT.SCALE_CROP.TEST_RESIZE == "square"
    return cfg.INPUT.SCALE_CROP.SIZE if wanted else 0


class SquareCrop(T.FixedSizeCrop):
    """A window of size x size pixels at a random place; smaller images are padded at the right and bottom.

    Differs from its base class in two points. x and y are drawn independently, where Detectron2 draws once
    for both and so only ever crops along the diagonal. Polygons are clipped here, without shapely, and keep
    holes that are cut in by a seam (see ``clip_polygon``).
    """

    def __init__(self, size: int, pad_value: float = 128.0, seg_pad_value: int = 255):
        super().__init__((size, size), pad=True, pad_value=pad_value, seg_pad_value=seg_pad_value)
        self._init({"size": size, "pad_value": pad_value, "seg_pad_value": seg_pad_value})

    def get_transform(self, image: np.ndarray) -> T.TransformList:
        size = self.crop_size[0]
        height, width = image.shape[:2]
        kept_h, kept_w = min(height, size), min(width, size)
        x0, y0 = (
            int(round((side - kept) * np.random.uniform()))
            for side, kept in ((width, kept_w), (height, kept_h))
        )
        crop = ClippingCrop(x0, y0, kept_w, kept_h, width, height)
        pad = T.PadTransform(
            0, 0, size - kept_w, size - kept_h, kept_w, kept_h, self.pad_value, self.seg_pad_value
        )
        return T.TransformList([crop, pad])


class ClippingCrop(T.CropTransform):
    """Detectron2's CropTransform with another way to crop polygons."""

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """(n, 2) float polygons in pixels -> those that are left, relative to the window."""
        clipped = (clip_polygon(p, self.x0, self.y0, self.x0 + self.w, self.y0 + self.h) for p in polygons)
        return [p - (self.x0, self.y0) for p in clipped if len(p)]


def clip_polygon(polygon: np.ndarray, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Intersection of a polygon with a window (Sutherland & Hodgman 1974), one half-plane after the other.

    Pieces of a concave polygon stay joined along the window's border, and a hole that a seam joins to the
    outline stays a hole: such seams enclose nothing, so the rasterised mask and the shoelace area are exact.

    Args:
        polygon: (n, 2) float, in pixels.
    Returns:
        (m, 2) float64; (0, 2) if no area is left.
    """
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    # A point is inside a half-plane where sign * (coordinate - bound) >= 0.
    for axis, bound, sign in ((0, x0, 1), (0, x1, -1), (1, y0, 1), (1, y1, -1)):
        points = _clip_half_plane(points, axis, bound, sign)
    x, y = points.T
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return points if len(points) >= 3 and area > 0 else np.zeros((0, 2))


def _clip_half_plane(points: np.ndarray, axis: int, bound: float, sign: int) -> np.ndarray:
    distance = sign * (points[:, axis] - bound)
    if (distance >= 0).all():
        return points
    following, distance_after = np.roll(points, -1, axis=0), np.roll(distance, -1)
    inside, crosses = distance >= 0, (distance >= 0) != (distance_after >= 0)
    share = distance[crosses] / (distance[crosses] - distance_after[crosses])
    crossing = np.zeros_like(points)
    crossing[crosses] = points[crosses] + share[:, None] * (following[crosses] - points[crosses])
    crossing[crosses, axis] = bound
    # Of each edge: its start if that is inside, then the point where it crosses.
    return np.stack([points, crossing], axis=1)[np.stack([inside, crosses], axis=1)]


def _scale_crop(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    settings = cfg.INPUT.SCALE_CROP
    size, low, high = settings.SIZE, settings.MIN_SCALE, settings.MAX_SCALE
    if size < 1 or not 0 < low <= high:
        raise ValueError(
            f"INPUT.SCALE_CROP: SIZE {size}, MIN_SCALE {low}, MAX_SCALE {high}; "
            "need SIZE >= 1 and 0 < MIN <= MAX."
        )
    if settings.TEST_RESIZE not in TEST_RESIZES:
        raise ValueError(
            f"INPUT.SCALE_CROP.TEST_RESIZE is {settings.TEST_RESIZE!r}; choose one of {', '.join(TEST_RESIZES)}."
        )
    if not is_train:
        if settings.TEST_RESIZE == "shortest_edge":
            return detection_utils.build_augmentation(cfg, is_train=False)
        # The long side to SIZE: the short one would be SIZE, but the long one must not exceed it.
        return [T.ResizeShortestEdge(size, size)]
    crop = SquareCrop(size, seg_pad_value=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    augmentations = [T.ResizeScale(low, high, size, size), crop]
    flip = cfg.INPUT.RANDOM_FLIP
    if flip not in ("none", "horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP is {flip!r}; choose none, horizontal or vertical.")
    if flip != "none":
        augmentations.append(T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
    return augmentations
