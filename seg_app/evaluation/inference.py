"""Testing at several sizes, each also mirrored, and piece by piece; labels without all scores.

All are wrappers that are called like the model. What is averaged are scores in 0..1: those of mask heads as they are,
softmax of pixel heads' logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import CfgNode
from seg_app.data.mapper import ResizeShortEdge
from seg_app.models.score_maps import Given, Mean, Mirrored, Resized, ScoreMap, Softmax

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


class _Wrapper(nn.Module):
    """What wrappers have in common: scores as maps that are computed when wanted, or all of them at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.train(self.model.training)

    def forward(self, batch: Batch) -> Batch:
        """Per image {"sem_seg": (K, H, W) scores}."""
        return [{"sem_seg": scores.all()} for scores in self.score_maps(batch)]

    def score_maps(self, batch: Batch) -> list[ScoreMap]:
        raise NotImplementedError


class LabelModel(_Wrapper):
    """Gives classes instead of scores, a few rows at a time: all scores of a large image may not fit into memory.

    Results are {"sem_seg": labels}; ``labels.argmax(dim=0)`` gives (H, W) int64, and that is what evaluators ask for.
    """

    def forward(self, batch: Batch) -> Batch:
        return [{"sem_seg": _Labels(scores.argmax())} for scores in self.score_maps(batch)]

    def score_maps(self, batch: Batch) -> list[ScoreMap]:
        return score_maps_of(self.model, batch)


class _Labels:
    def __init__(self, labels: Tensor) -> None:
        self._labels = labels

    def argmax(self, dim: int) -> Tensor:
        assert dim == 0
        return self._labels


class SlidingWindowModel(_Wrapper):
    """Cuts images into overlapping windows, averages scores where they overlap.

    Args:
        model: a FrozenSegmentor, also one in DistributedDataParallel.
        size: side of the windows in pixels. Images that fit into one are not cut.
        overlap: share of a window that the next one covers too, at least.
    """

    def __init__(self, model: nn.Module, size: int, overlap: float) -> None:
        super().__init__(model)
        self.size, self.overlap = size, overlap

    def score_maps(self, batch: Batch) -> list[ScoreMap]:
        return [self._one(item) for item in batch]

    def _one(self, item: dict[str, Any]) -> ScoreMap:
        h, w = item["image"].shape[-2:]
        if max(h, w) <= self.size:
            return chances_of(self.model, [item])[0]
        wanted = int(item.get("height", h)), int(item.get("width", w))
        return Resized(_Windows(self.model, item["image"], self.size, self.overlap), wanted)


class _Windows(ScoreMap):
    """Mean of the windows at each pixel. Windows are looked at when their rows are wanted, and then let go."""

    def __init__(self, model: nn.Module, image: Tensor, size: int, overlap: float) -> None:
        self.model, self.image, self.size = model, image, size
        h, w = image.shape[-2:]
        self.top = window_starts(h, size, overlap)
        self.left = window_starts(w, size, overlap)
        self._found: dict[int, list[ScoreMap]] = {}  # by top
        first = self._windows(0)[0]
        self.shape = (first.shape[0], h, w)
        self.row_cost = self.shape[0] * w + first.row_cost

    def rows(self, start: int, stop: int) -> Tensor:
        total = torch.zeros(self.shape[0], stop - start, self.shape[2])
        covered = torch.zeros(stop - start, self.shape[2])
        # Rows are asked for from above to below.
        self._found = {y: found for y, found in self._found.items() if y + self.size > start}
        for y in self.top:
            upper, lower = max(y, start), min(y + self.size, stop)
            if upper >= lower:
                continue
            for x, found in zip(self.left, self._windows(y)):
                part = found.rows(upper - y, lower - y)
                total, covered = total.to(part.device), covered.to(part.device)
                at = (slice(upper - start, lower - start), slice(x, x + self.size))
                total[(slice(None), *at)] += part
                covered[at] += 1
        return total.div_(covered)

    def _windows(self, y: int) -> list[ScoreMap]:
        if y not in self._found:
            pieces = [self.image[:, y : y + self.size, x : x + self.size] for x in self.left]
            self._found[y] = chances_of(self.model, [{"image": piece} for piece in pieces])
        return self._found[y]


def window_starts(length: int, size: int, overlap: float) -> list[int]:
    """Where windows of ``size`` begin, so that they cover ``length`` evenly and overlap by at least the share."""
    if length <= size:
        return [0]
    count = 1 + math.ceil((length - size) / max(1, math.floor(size * (1 - overlap))))
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


class MultiScaleModel(_Wrapper):
    """Mean of the scores over several sizes of an image, each also mirrored.

    Args:
        model: a FrozenSegmentor, or a wrapper of one.
        sizes: of the short edge in pixels.
        max_size: of the long edge.
        flip: mirrored copies too.
    """

    def __init__(self, model: nn.Module, sizes: Sequence[int], max_size: int, flip: bool) -> None:
        super().__init__(model)
        if not sizes:
            raise ValueError("TEST.AUG.MIN_SIZES is empty; it lists short edges in pixels.")
        self.resizes = [ResizeShortEdge(size, max_size, "choice") for size in sizes]
        self.flip = flip

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> MultiScaleModel:
        aug = cfg.TEST.AUG
        return cls(sliding_window_of(cfg, model), aug.MIN_SIZES, aug.MAX_SIZE, aug.FLIP)

    def score_maps(self, batch: Batch) -> list[ScoreMap]:
        """Of images at the files' own resolution."""
        return [self._one(item) for item in batch]

    def _one(self, item: dict[str, Any]) -> ScoreMap:
        image = item["image"]
        size = {
            "height": int(item.get("height", image.shape[-2])),
            "width": int(item.get("width", image.shape[-1])),
        }
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        copies: list[ScoreMap] = []
        for resize in self.resizes:
            resized = np.array(resize.get_transform(pixels).apply_image(pixels))
            copy = torch.from_numpy(resized).permute(2, 0, 1)
            copies += chances_of(self.model, [{"image": copy, **size}])
            if self.flip:
                copies += map(Mirrored, chances_of(self.model, [{"image": copy.flip(-1), **size}]))
        return Mean(copies)


def chances_of(model: nn.Module, batch: Batch) -> list[ScoreMap]:
    """Scores per image that may be averaged."""
    found = score_maps_of(model, batch)
    pixel_head = hasattr(model, "sem_seg_head") and getattr(model, "criterion", None) is None
    return [Softmax(one) for one in found] if pixel_head else found


def score_maps_of(model: nn.Module, batch: Batch) -> list[ScoreMap]:
    """Of any model that gives Detectron2's results; without all numbers in memory where it can do so."""
    if hasattr(model, "score_maps"):
        return model.score_maps(batch)
    return [Given(result["sem_seg"]) for result in model(batch)]
