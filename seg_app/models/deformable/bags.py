"""Deformable attention on CPU: sampling and weighing are one sparse matrix, applied once.

A query of one head reads 4 cells per sampling point, so its result is a weighted sum of 4*L*P rows of a table of
values: ``embedding_bag``. This reads and adds whole rows (D numbers side by side) and stores no samples, where
grid_sample walks through the D channels one by one and writes L*P results per query for a second pass.

Same numbers as :func:`attend_by_grid_sample`, gradients included; float32 and float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor

# Rows of the sparse matrix (queries x heads) that are in memory at a time; 48 entries each in the usual setting.
_ROWS_AT_ONCE = 1 << 16

Shapes = tuple[tuple[int, int], ...]


def attend_by_bags(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """As :func:`seg_app.models.deformable.deformable_attention`, for float32 and float64 on CPU."""
    return _Bags.apply(value, tuple(map(tuple, shapes)), locations, weights)


class _Bags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        B, _, M, D = value.shape
        Lq = locations.shape[1]
        out = value.new_empty(B, Lq * M, D)
        borders = _Borders.of(shapes, M, value.dtype)
        for b in range(B):
            table = borders.table(value[b])
            for rows in _row_ranges(Lq * M, M):
                part = _Part(borders, locations[b], weights[b], rows)
                out[b, rows] = F.embedding_bag(
                    part.cells, table, mode="sum", per_sample_weights=part.cell_weights
                )
        return out.view(B, Lq, M * D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, locations, weights = ctx.saved_tensors
        B, _, M, D = value.shape
        borders = _Borders.of(ctx.shapes, M, value.dtype)
        grad = grad.reshape(B, -1, D)
        grad_value = torch.empty_like(value) if ctx.needs_input_grad[0] else None
        points = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        grad_locations = torch.empty(locations.shape, dtype=value.dtype) if points else None
        grad_weights = torch.empty(weights.shape, dtype=value.dtype) if points else None
        for b in range(B):
            table = borders.table(value[b])
            grad_table = torch.zeros_like(table)
            for rows in _row_ranges(grad.shape[1], M):
                part = _Part(borders, locations[b], weights[b], rows)
                g = grad[b, rows].contiguous()
                if grad_value is not None:
                    grad_table += part.spread(g, len(table))
                if grad_locations is not None and grad_weights is not None:
                    to_locations, to_weights = part.backward(table, g)
                    grad_locations[b].view(-1, *to_locations.shape[1:])[rows] = to_locations
                    grad_weights[b].view(-1, to_weights.shape[1])[rows] = to_weights
            if grad_value is not None:
                grad_value[b] = borders.without_border(grad_table)
        return grad_value, None, grad_locations, grad_weights


def _row_ranges(count: int, heads: int) -> Iterator[slice]:
    """Slices over queries x heads; every one begins at a query, since a row's head is its number modulo heads."""
    step = max(1, _ROWS_AT_ONCE // heads) * heads
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


class _Borders:
    """Levels with a border of zeros: one row above, two below, the same at the sides.

    A point outside a level then reads zeros without a test per cell. Numbers of a point's level are kept once per
    sampling point of all levels, (L * P,) long, as the passes over the points need them.
    """

    def __init__(self, shapes: Shapes, heads: int, dtype: torch.dtype) -> None:
        self.shapes, self.heads, self.dtype = shapes, heads, dtype
        self.sizes = torch.tensor([(w, h) for h, w in shapes], dtype=dtype)  # (L, 2)
        self.strides = torch.tensor([w + 3 for _, w in shapes], dtype=torch.int32)
        starts = [0]
        for h, w in shapes:
            starts.append(starts[-1] + (h + 3) * (w + 3))
        self.cell_count = starts[-1]
        self.starts = torch.tensor(starts[:-1], dtype=torch.int32)
        # The last cell of each level that has a right and a lower neighbour.
        self.last_corners = self.starts + torch.tensor(
            [(h + 2) * (w + 3) - 2 for h, w in shapes], dtype=torch.int32
        )

    @staticmethod
    @lru_cache(maxsize=16)
    def of(shapes: Shapes, heads: int, dtype: torch.dtype) -> _Borders:
        return _Borders(shapes, heads, dtype)

    def table(self, value: Tensor) -> Tensor:
        """(S, M, D) -> (cells with borders * M, D)."""
        _, M, D = value.shape
        table = value.new_zeros(self.cell_count, M * D)
        for cells, inner in zip(self._split(value), self._inner(table)):
            inner.copy_(cells)
        return table.view(-1, D)

    def without_border(self, table: Tensor) -> Tensor:
        """The inverse: (cells with borders * M, D) -> (S, M, D)."""
        M, D = self.heads, table.shape[1]
        inner = self._inner(table.view(self.cell_count, M * D))
        return torch.cat([level.reshape(-1, M, D) for level in inner])

    def _split(self, value: Tensor) -> list[Tensor]:
        levels = value.split([h * w for h, w in self.shapes])
        return [level.reshape(h, w, -1) for level, (h, w) in zip(levels, self.shapes)]

    def _inner(self, table: Tensor) -> list[Tensor]:
        levels = table.split([(h + 3) * (w + 3) for h, w in self.shapes])
        return [
            level.view(h + 3, w + 3, -1)[1 : h + 1, 1 : w + 1] for level, (h, w) in zip(levels, self.shapes)
        ]


class _Part:
    """Some rows of the sparse matrix: which cells they read, and how much of each.

    Args:
        borders: of the levels.
        locations: (Lq, M, L, P, 2) x, y of one image, 0..1 over each level.
        weights: (Lq, M, L, P).
        rows: of the Lq * M.
    """

    def __init__(self, borders: _Borders, locations: Tensor, weights: Tensor, rows: slice) -> None:
        L, P = weights.shape[2:]
        self.borders = borders
        self.weights = weights.reshape(-1, L, P)[rows].to(borders.dtype)  # (N, L, P)
        places = locations.reshape(-1, L, P, 2)[rows].to(borders.dtype)
        width, height = borders.sizes.unbind(-1)
        # Pixel coordinates + 1, for the border: a cell's centre has its index in the table. Everything from one cell
        # outside on reads zeros only, wherever exactly it is.
        self.x = torch.addcmul(_HALF, places[..., 0], width[:, None]).clamp_(_ZERO, width[:, None] + 1)
        self.y = torch.addcmul(_HALF, places[..., 1], height[:, None]).clamp_(_ZERO, height[:, None] + 1)
        left, top = self.x.floor(), self.y.floor()
        self.fx, self.fy = self.x - left, self.y - top
        stride, M = borders.strides[:, None], borders.heads
        cell = top.to(torch.int32).mul_(stride).add_(left.to(torch.int32)).add_(borders.starts[:, None])
        # NaN becomes some integer; its weight stays NaN.
        cell = cell.clamp_(_ZERO.int(), borders.last_corners[:, None])
        head = torch.arange(M, dtype=torch.int32).repeat(len(cell) // M)
        cell = cell.mul_(M).add_(head[:, None, None])
        lower = self.weights * self.fy
        upper = self.weights - lower
        self.cells = torch.stack((cell, cell + M, cell + stride * M, cell + (stride + 1) * M), dim=1).flatten(
            1
        )  # (N, 4 * L * P)
        right_upper, right_lower = upper * self.fx, lower * self.fx
        self.cell_weights = torch.stack(
            (upper - right_upper, right_upper, lower - right_lower, right_lower), dim=1
        ).flatten(1)

    def spread(self, grad: Tensor, table_rows: int) -> Tensor:
        """The transposed matrix times ``grad`` (N, D): the gradient of the table."""
        N, per_row = self.cells.shape
        ends = torch.arange(0, N * per_row + 1, per_row, dtype=torch.int32)
        arrays = (self.cell_weights.flatten().numpy(), self.cells.flatten().numpy(), ends.numpy())
        return torch.from_numpy(csr_matrix(arrays, shape=(N, table_rows)).T @ grad.numpy())

    def backward(self, table: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the locations (N, L, P, 2) and of the weights (N, L * P)."""
        with torch.enable_grad():
            entries = self.cell_weights.requires_grad_()
            out = F.embedding_bag(self.cells, table, mode="sum", per_sample_weights=entries)
        (to_entries,) = torch.autograd.grad(out, entries, grad)
        corners = to_entries.view(len(to_entries), 4, *self.weights.shape[1:])
        upper_left, upper_right, lower_left, lower_right = corners.unbind(1)
        upper_slope, lower_slope = upper_right - upper_left, lower_right - lower_left
        upper = torch.addcmul(upper_left, self.fx, upper_slope)
        lower = torch.addcmul(lower_left, self.fx, lower_slope)
        to_weights = torch.lerp(upper, lower, self.fy)
        width, height = self.borders.sizes[:, None].unbind(-1)
        to_x = torch.lerp(upper_slope, lower_slope, self.fy) * self.weights * width
        to_y = (lower - upper) * self.weights * height
        # Clamped coordinates do not move.
        to_x.masked_fill_((self.x <= 0) | (self.x >= width + 1), 0)
        to_y.masked_fill_((self.y <= 0) | (self.y >= height + 1), 0)
        return torch.stack((to_x, to_y), dim=-1), to_weights.flatten(1)


_ZERO = torch.zeros(())
_HALF = torch.full((), 0.5)
