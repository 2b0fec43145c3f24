"""Testing at several sizes, each also mirrored, and piece by piece. Wrappers that are called like the model.

What is averaged are scores in 0..1: those of mask heads as they are, softmax of pixel heads' logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import CfgNode
from seg_app.data.mapper import ResizeShortEdge

Batch = list[dict[str, Any]]


def sliding_window_of(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model, piece by piece where TEST.SLIDING_WINDOW says so.

    Raises:
        ValueError: SIZE or OVERLAP out of range.
    """
    settings = cfg.TEST.SLIDING_WINDOW
    if settings.SIZE < 0 or not 0 <= settings.OVERLAP < 1:
        raise ValueError(
            f"TEST.SLIDING_WINDOW: SIZE {settings.SIZE}, OVERLAP {settings.OVERLAP}; SIZE is pixels or 0, OVERLAP a "
            "share from 0 to below 1."
        )
    return SlidingWindowModel(model, settings.SIZE, settings.OVERLAP) if settings.SIZE else model


class SlidingWindowModel(nn.Module):
    """Cuts images into overlapping windows, averages scores where they overlap.

    Args:
        model: a FrozenSegmentor, also one in DistributedDataParallel.
        size: side of the windows in pixels. Images that fit into one are not cut.
        overlap: share of a window that the next one covers too, at least.
    """

    def __init__(self, model: nn.Module, size: int, overlap: float) -> None:
        super().__init__()
        self.model = _unwrapped(model)
        self.size, self.overlap = size, overlap
        self.train(self.model.training)

    def forward(self, batch: Batch) -> Batch:
        return [self._one(item) for item in batch]

    def _one(self, item: dict[str, Any]) -> dict[str, Any]:
        image = item["image"]
        h, w = image.shape[-2:]
        if max(h, w) <= self.size:
            return {"sem_seg": chances_of(self.model, [item])[0]}
        rows, columns = window_starts(h, self.size, self.overlap), window_starts(w, self.size, self.overlap)
        total = covered = None
        for y in rows:
            pieces = [image[:, y : y + self.size, x : x + self.size] for x in columns]
            for x, found in zip(columns, chances_of(self.model, [{"image": piece} for piece in pieces])):
                if total is None or covered is None:
                    total, covered = found.new_zeros(len(found), h, w), found.new_zeros(h, w)
                total[:, y : y + self.size, x : x + self.size] += found
                covered[y : y + self.size, x : x + self.size] += 1
        assert total is not None and covered is not None
        wanted = int(item.get("height", h)), int(item.get("width", w))
        return {"sem_seg": _resized(total.div_(covered), wanted)}


def window_starts(length: int, size: int, overlap: float) -> list[int]:
    """Where windows of ``size`` begin, so that they cover ``length`` evenly and overlap by at least the share."""
    if length <= size:
        return [0]
    count = 1 + math.ceil((length - size) / max(1, math.floor(size * (1 - overlap))))
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


class MultiScaleModel(nn.Module):
    """Mean of the scores over several sizes of an image, each also mirrored.

    Args:
        model: a FrozenSegmentor, or a wrapper of one.
        sizes: of the short edge in pixels.
        max_size: of the long edge.
        flip: mirrored copies too.
    """

    def __init__(self, model: nn.Module, sizes: Sequence[int], max_size: int, flip: bool) -> None:
        super().__init__()
        if not sizes:
            raise ValueError("TEST.AUG.MIN_SIZES is empty; it lists short edges in pixels.")
        self.model = _unwrapped(model)
        self.resizes = [ResizeShortEdge(size, max_size, "choice") for size in sizes]
        self.flip = flip
        self.train(self.model.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> MultiScaleModel:
        aug = cfg.TEST.AUG
        return cls(sliding_window_of(cfg, model), aug.MIN_SIZES, aug.MAX_SIZE, aug.FLIP)

    def forward(self, batch: Batch) -> Batch:
        """Images at the files' own resolution."""
        return [self._one(item) for item in batch]

    def _one(self, item: dict[str, Any]) -> dict[str, Any]:
        image = item["image"]
        size = {
            "height": int(item.get("height", image.shape[-2])),
            "width": int(item.get("width", image.shape[-1])),
        }
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        total: Tensor | None = None
        copies = 0
        for resize in self.resizes:
            copy = torch.from_numpy(np.array(resize.get_transform(pixels).apply_image(pixels))).permute(
                2, 0, 1
            )
            for mirrored in (False, True)[: 1 + self.flip]:
                (found,) = chances_of(self.model, [{"image": copy.flip(-1) if mirrored else copy, **size}])
                found = found.flip(-1) if mirrored else found
                total = found.clone() if total is None else total.add_(found)
                copies += 1
        assert total is not None
        return {"sem_seg": total.div_(copies)}


def chances_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """(K, H, W) scores per image that may be averaged."""
    found = [result["sem_seg"] for result in model(batch)]
    pixel_head = hasattr(model, "sem_seg_head") and getattr(model, "criterion", None) is None
    return [one.softmax(dim=0) for one in found] if pixel_head else found


def _resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(scores.shape[-2:]) == size:
        return scores
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
