"""How does a neck compute on a CPU? Channels last: then depthwise convolutions and pooling are vectorised, 1x1
convolutions are plain matrix products, and a weighted sum makes no copies of its terms. The numbers are equal up to
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_last_on_cpu(feature: Tensor) -> Tensor:
    """(B, C, h, w) -> the same numbers, on a CPU with channels last in memory."""
    if feature.device.type != "cpu" or torch.jit.is_tracing():
        return feature
    return feature.contiguous(memory_format=torch.channels_last)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution; of a map with channels last on a CPU as the product with a matrix, which is what it is.

    Measured for 256 channels of 128 x 128 cells, two images, one thread: 0.7 of torch's time, forward and backward.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not _fast_layout(x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


def weighted_sum(shares: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """sum_i shares[i] * maps[i].

    Args:
        shares: (n,).
        maps: n maps of one shape.
    """
    first = maps[0]
    same = all(one.dtype == first.dtype and one.stride() == first.stride() for one in maps)
    if same and _fast_layout(first) and not torch.compiler.is_compiling():
        return _WeightedSum.apply(shares, *maps)
    # A 0-dim factor does not promote the maps, so half precision stays half precision.
    return sum((shares[i] * maps[i] for i in range(1, len(maps))), start=shares[0] * first)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shares: Tensor, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(shares, *maps)
        first, *others = shares.tolist()
        total = maps[0] * first
        for share, one in zip(others, maps[1:]):
            total.add_(one, alpha=share)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shares, *maps = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_shares = None
        if ctx.needs_input_grad[0]:
            of_shares = torch.stack([_dot(grad, one) for one in maps]).to(shares.dtype)
        of_maps = [
            grad * share if needed else None
            for share, needed in zip(shares.tolist(), ctx.needs_input_grad[1:])
        ]
        return of_shares, *of_maps


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all products of two maps with channels last, in float32 at least."""
    a, b = (one.permute(0, 2, 3, 1).reshape(-1) for one in (a, b))
    if a.dtype in (torch.float32, torch.float64):
        return torch.dot(a, b)
    return (a * b).sum(dtype=torch.float32)


def _fast_layout(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.jit.is_tracing() or torch.jit.is_scripting() or x.numel() == 0:
        return False
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
