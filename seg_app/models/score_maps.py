"""Score maps of which only some rows are in memory at a time: at 4000 x 4000 pixels and 150 classes, all are 9.6 GB.

A map is described (these masks, brought to that size, combined into classes, cut, averaged with others), and computed
row by row when it is asked for its classes (``argmax``) or for all of its numbers (``all``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers that a step of ``argmax`` or ``all`` may hold: 64 Mi, 256 MiB in float32.
_NUMBERS_AT_ONCE = 1 << 26


class ScoreMap:
    """(C, H, W) float32 numbers, computed when they are wanted.

    Attributes:
        shape: (C, H, W).
        row_cost: numbers in memory per row, while it is computed.
    """

    shape: tuple[int, int, int]
    row_cost: int

    def rows(self, start: int, stop: int) -> Tensor:
        """(C, stop - start, W)."""
        raise NotImplementedError

    def all(self) -> Tensor:
        """(C, H, W)."""
        parts = list(self._parts())
        if len(parts) == 1:
            return self.rows(*parts[0])
        first = self.rows(*parts[0])
        whole = first.new_empty(self.shape)
        whole[:, : parts[0][1]] = first
        for start, stop in parts[1:]:
            whole[:, start:stop] = self.rows(start, stop)
        return whole

    def argmax(self) -> Tensor:
        """(H, W) int64: the first channel with the largest number, at each pixel."""
        return torch.cat([self.rows(*part).argmax(dim=0) for part in self._parts()])

    def _parts(self) -> list[tuple[int, int]]:
        H = self.shape[1]
        step = max(1, _NUMBERS_AT_ONCE // max(1, self.row_cost))
        return [(start, min(start + step, H)) for start in range(0, H, step)]


class Given(ScoreMap):
    """A tensor (C, H, W) that exists."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.shape = (numbers.shape[0], numbers.shape[1], numbers.shape[2])
        self.row_cost = self.shape[0] * self.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.numbers[:, start:stop].float()


class Cut(ScoreMap):
    """The upper left h x w of a map: without its padding."""

    def __init__(self, inner: ScoreMap, size: tuple[int, int]) -> None:
        self.inner = inner
        self.shape = (inner.shape[0], min(size[0], inner.shape[1]), min(size[1], inner.shape[2]))
        self.row_cost = inner.row_cost

    def rows(self, start: int, stop: int) -> Tensor:
        return self.inner.rows(start, stop)[..., : self.shape[2]]


class Resized(ScoreMap):
    """A map brought to another size, bilinear, as ``interpolate(align_corners=False)`` does it."""

    def __init__(self, inner: ScoreMap, size: tuple[int, int]) -> None:
        self.inner = inner
        self.shape = (inner.shape[0], *size)
        per_row = max(1, -(-inner.shape[1] // size[0]))  # rows of the inner map for one of this
        self.row_cost = max(self.shape[0] * size[1], per_row * inner.row_cost)

    def rows(self, start: int, stop: int) -> Tensor:
        (_, h, w), (_, H, W) = self.inner.shape, self.shape
        if (h, w) == (H, W):
            return self.inner.rows(start, stop)
        if (start, stop) == (0, H):
            return _to_size(self.inner.rows(0, h), H, W)
        places = ((torch.arange(start, stop, dtype=torch.float64) + 0.5) * (h / H) - 0.5).clamp(0, h - 1)
        upper = places.long()
        lower = (upper + 1).clamp(max=h - 1)
        first = int(upper[0])
        wide = self.inner.rows(first, int(lower[-1]) + 1)
        wide = _to_size(wide, wide.shape[1], W)
        share = (places - upper).to(wide.device, wide.dtype)[:, None]
        above, below = (wide.index_select(1, (which - first).to(wide.device)) for which in (upper, lower))
        return torch.lerp(above, below, share)


class ClassesOfQueries(ScoreMap):
    """Sum over queries of class probability times mask probability (arXiv 2107.06278, section 3.4).

    Args:
        logits: (Q, K + 1); the last class, "no object", has no score.
        masks: (Q, H, W) logits.
    """

    def __init__(self, logits: Tensor, masks: ScoreMap) -> None:
        self.chances = logits.float().softmax(-1)[:, :-1].t()  # (K, Q)
        self.masks = masks
        self.shape = (len(self.chances), *masks.shape[1:])
        self.row_cost = self.shape[0] * self.shape[2] + masks.row_cost

    def rows(self, start: int, stop: int) -> Tensor:
        masks = self.masks.rows(start, stop).sigmoid()
        return torch.einsum("kq,qhw->khw", self.chances, masks)


class Softmax(ScoreMap):
    """Over the channels."""

    def __init__(self, inner: ScoreMap) -> None:
        self.inner, self.shape = inner, inner.shape
        self.row_cost = 2 * inner.row_cost

    def rows(self, start: int, stop: int) -> Tensor:
        return self.inner.rows(start, stop).softmax(dim=0)


class Mirrored(ScoreMap):
    """Left and right changed."""

    def __init__(self, inner: ScoreMap) -> None:
        self.inner, self.shape, self.row_cost = inner, inner.shape, inner.row_cost

    def rows(self, start: int, stop: int) -> Tensor:
        return self.inner.rows(start, stop).flip(-1)


class Mean(ScoreMap):
    """Of maps of one size."""

    def __init__(self, maps: Sequence[ScoreMap]) -> None:
        assert len({one.shape for one in maps}) == 1
        self.maps, self.shape = list(maps), maps[0].shape
        self.row_cost = self.shape[0] * self.shape[2] + max(one.row_cost for one in maps)

    def rows(self, start: int, stop: int) -> Tensor:
        total = self.maps[0].rows(start, stop).clone()
        for one in self.maps[1:]:
            total += one.rows(start, stop)
        return total.div_(len(self.maps))


def _to_size(maps: Tensor, height: int, width: int) -> Tensor:
    if tuple(maps.shape[-2:]) == (height, width):
        return maps
    return F.interpolate(maps[None], size=(height, width), mode="bilinear", align_corners=False)[0]
