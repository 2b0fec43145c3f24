"""Training batches without data, for measuring: as the loader would give them, with pictures of blurred noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, PolygonMasks

_SEED = 0
# A picture of ADE20K shows about ten classes.
_PATCHES_PER_SIDE = 3


def generated_batch(
    size: int, count: int, num_classes: int, objects: int = 8, channels: int = 3
) -> list[dict[str, Any]]:
    """Blurred noise with octagons on it, as DatasetMapper would give it.

    Args:
        objects: in each picture; COCO has 7.3 in one.
    """
    draw = np.random.default_rng(_SEED)
    batch = []
    for _ in range(count):
        image = blurred_noise(draw, size, channels)
        truth = Instances((size, size))
        side = draw.uniform(size / 16, size / 2, (objects, 1))
        center = side / 2 + draw.uniform(0, 1, (objects, 2)) * (size - side)
        boxes = np.concatenate((center - side / 2, center + side / 2), axis=1)
        angle = (np.arange(8) + 0.5) * np.pi / 4
        corner = np.stack((np.cos(angle), np.sin(angle)), axis=1) / np.cos(np.pi / 8)
        outlines = (center[:, None] + side[:, None] / 2 * corner).clip(0, size)  # (objects, 8, 2)
        truth.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        truth.gt_classes = torch.from_numpy(draw.integers(0, num_classes, objects))
        truth.gt_masks = PolygonMasks([[outline.reshape(-1)] for outline in outlines])
        batch.append({"image": image, "height": size, "width": size, "instances": truth})
    return batch


def generated_label_batch(size: int, count: int, num_classes: int, channels: int = 3) -> list[dict[str, Any]]:
    """Blurred noise, and a class for each pixel, in 3 x 3 patches."""
    draw = np.random.default_rng(_SEED)
    batch = []
    for _ in range(count):
        coarse = draw.integers(0, num_classes, (_PATCHES_PER_SIDE, _PATCHES_PER_SIDE))
        place = np.arange(size) * _PATCHES_PER_SIDE // size
        labels = torch.from_numpy(coarse[place][:, place])
        image = blurred_noise(draw, size, channels)
        batch.append({"image": image, "height": size, "width": size, "sem_seg": labels})
    return batch


def blurred_noise(draw: np.random.Generator, size: int, channels: int = 3) -> torch.Tensor:
    """(channels, size, size) uint8."""
    squares = max(1, size // 16)
    coarse = torch.from_numpy(draw.uniform(0, 255, (1, channels, squares, squares))).float()
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0].to(torch.uint8)


def training_side(cfg: CfgNode) -> int:
    """Side in pixels of a square with as many pixels as a training picture has, after augmentation.

    Exact for crops; of pictures that are only resized, as many as one of 4:3 has at the largest size.
    """
    settings = cfg.INPUT
    if settings.AUGMENTATION == "scale_crop":
        return int(settings.SCALE_CROP.SIZE)
    if settings.CROP.ENABLED and settings.CROP.TYPE == "absolute":
        return round(math.sqrt(math.prod(settings.CROP.SIZE)))
    short = max(settings.MIN_SIZE_TRAIN)
    return round(math.sqrt(short * min(short * 4 / 3, settings.MAX_SIZE_TRAIN)))
