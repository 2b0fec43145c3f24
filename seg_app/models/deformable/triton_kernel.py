"""Deformable attention as one Triton kernel each way: nothing between the values and the result is stored.

Importing this needs Triton, which comes with torch's CUDA builds on Linux. The kernels accumulate in float32
(float64 for float64). The backward pass adds with atomics, so sums may differ in their last bits from run to run,
as those of grid_sample on CUDA do.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own)

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]


def attend_by_kernel(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """As :func:`seg_app.models.deformable.deformable_attention`, on CUDA (or in Triton's interpreter on CPU)."""
    return _Kernel.apply(value, tuple(map(tuple, shapes)), locations, weights)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
        levels = _levels(shapes, value.device)
        ctx.save_for_backward(value, levels, locations, weights)
        B, _, M, D = value.shape
        out = value.new_empty(B, locations.shape[1], M * D)
        if out.numel() == 0:
            return out
        grid, sizes = _launch(value, locations)
        with _on(value.device):
            _attend[grid](value, levels, locations, weights, out, **sizes)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, levels, locations, weights = ctx.saved_tensors
        # Atomic sums of half-precision numbers lose the small ones.
        to_value = torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
        to_locations, to_weights = torch.empty_like(locations), torch.empty_like(weights)
        if grad.numel():
            grid, sizes = _launch(value, locations)
            ways_back = (grad.contiguous(), to_value, to_locations, to_weights)
            with _on(value.device):
                _attend_backward[grid](value, levels, locations, weights, *ways_back, **sizes)
        return to_value.to(value.dtype), None, to_locations, to_weights


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be needed in training later
def _levels(shapes: Shapes, device: torch.device) -> Tensor:
    """(L, 3) int32: height, width, first cell. Kept, since a copy to the device makes the CPU wait for it."""
    rows, first = [], 0
    for h, w in shapes:
        rows.append((h, w, first))
        first += h * w
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _launch(value: Tensor, locations: Tensor) -> tuple[tuple[int, int], dict]:
    """A program handles a block of queries of one head of one image: (grid, sizes for the kernel)."""
    B, S, M, D = value.shape
    _, Lq, _, L, P, _ = locations.shape
    width = triton.next_power_of_2(D)
    block = max(16, min(64, 1024 // width))
    sizes = {
        "Lq": Lq,
        "S": S,
        "M": M,
        "D": D,
        "L": L,
        "P": P,
        "WIDTH": width,
        "BLOCK": block,
        "ACC": tl.float64 if value.dtype == torch.float64 else tl.float32,
    }
    return (triton.cdiv(Lq, block), B * M), sizes


def _on(device: torch.device) -> AbstractContextManager:
    # Triton launches on the current device, whatever device the tensors are on.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def _block(Lq, S, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Which rows of (B, Lq, M) this program computes, where its head's values begin, and which rows exist."""
    image = (tl.program_id(1) // M).to(tl.int64)
    head = tl.program_id(1) % M
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return (image * Lq + query) * M + head, (image * S * M + head) * D, query < Lq


@triton.jit
def _place(locations, at, h, w, ok, ACC: tl.constexpr):
    """Upper left cell (column, row) of a location, and how far right and down of its centre it lies, 0..1."""
    x = tl.load(locations + 2 * at, mask=ok, other=0.0).to(ACC) * w - 0.5
    y = tl.load(locations + 2 * at + 1, mask=ok, other=0.0).to(ACC) * h - 0.5
    # Beyond two cells outside nothing is read; the bounds keep the integers small.
    near_x = tl.minimum(tl.maximum(x, -2.0), w + 1.0)
    near_y = tl.minimum(tl.maximum(y, -2.0), h + 1.0)
    column, row = tl.floor(near_x), tl.floor(near_y)
    # NaN is at no place, and must not be taken for one: its shares stay NaN.
    right = tl.where(x == x, near_x - column, x)
    down = tl.where(y == y, near_y - row, y)
    return column.to(tl.int32), row.to(tl.int32), right, down


# Numbers that change with the image size must not each bring a compilation of their own.
@triton.jit(do_not_specialize=["Lq", "S"])
def _attend(
    value,
    levels,
    locations,
    weights,
    out,
    Lq,
    S,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    entry, first, ok = _block(Lq, S, M, D, BLOCK)
    channel = tl.arange(0, WIDTH)
    channel_ok = channel < D
    total = tl.zeros((BLOCK, WIDTH), dtype=ACC)
    for level in range(L):
        h = tl.load(levels + 3 * level)
        w = tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in range(P):
            at = (entry * L + level) * P + point
            weight = tl.load(weights + at, mask=ok, other=0.0).to(ACC)
            column, row, right, down = _place(locations, at, h, w, ok, ACC)
            for corner in tl.static_range(4):
                i = column + corner % 2
                j = row + corner // 2
                share = weight * (right if corner % 2 else 1 - right) * (down if corner // 2 else 1 - down)
                inside = ok & (i >= 0) & (i < w) & (j >= 0) & (j < h)
                cell = (start + j * w + i).to(tl.int64) * (M * D)
                read = tl.load(
                    value + first + cell[:, None] + channel[None, :],
                    mask=inside[:, None] & channel_ok[None, :],
                    other=0.0,
                )
                total += share[:, None] * read.to(ACC)
    tl.store(
        out + entry[:, None] * D + channel[None, :],
        total.to(out.dtype.element_ty),
        mask=ok[:, None] & channel_ok[None, :],
    )


@triton.jit(do_not_specialize=["Lq", "S"])
def _attend_backward(
    value,
    levels,
    locations,
    weights,
    grad,
    to_value,
    to_locations,
    to_weights,
    Lq,
    S,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    entry, first, ok = _block(Lq, S, M, D, BLOCK)
    channel = tl.arange(0, WIDTH)
    channel_ok = channel < D
    g = tl.load(
        grad + entry[:, None] * D + channel[None, :], mask=ok[:, None] & channel_ok[None, :], other=0.0
    ).to(ACC)
    for level in range(L):
        h = tl.load(levels + 3 * level)
        w = tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in range(P):
            at = (entry * L + level) * P + point
            weight = tl.load(weights + at, mask=ok, other=0.0).to(ACC)
            column, row, right, down = _place(locations, at, h, w, ok, ACC)
            to_weight = tl.zeros((BLOCK,), dtype=ACC)
            to_x = tl.zeros((BLOCK,), dtype=ACC)
            to_y = tl.zeros((BLOCK,), dtype=ACC)
            for corner in tl.static_range(4):
                i = column + corner % 2
                j = row + corner // 2
                across = right if corner % 2 else 1 - right
                along = down if corner // 2 else 1 - down
                inside = ok & (i >= 0) & (i < w) & (j >= 0) & (j < h)
                cell = first + (start + j * w + i).to(tl.int64) * (M * D)
                where = cell[:, None] + channel[None, :]
                mask = inside[:, None] & channel_ok[None, :]
                read = tl.load(value + where, mask=mask, other=0.0).to(ACC)
                common = tl.sum(read * g, axis=1)
                to_weight += across * along * common
                to_x += (along if corner % 2 else -along) * common
                to_y += (across if corner // 2 else -across) * common
                spread = (weight * across * along)[:, None] * g
                tl.atomic_add(
                    to_value + where, spread.to(to_value.dtype.element_ty), mask=mask, sem="relaxed"
                )
            tl.store(to_weights + at, to_weight.to(to_weights.dtype.element_ty), mask=ok)
            kind = to_locations.dtype.element_ty
            tl.store(to_locations + 2 * at, (to_x * weight * w).to(kind), mask=ok)
            tl.store(to_locations + 2 * at + 1, (to_y * weight * h).to(kind), mask=ok)
