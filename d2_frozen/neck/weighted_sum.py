"""A sum of maps with one factor each, in fewer operations than autograd takes: a GPU waits for each of them, and on a
CPU each term would be a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2_frozen.neck.cpu_layout import has_fast_layout


def weighted_sum(shares: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """sum_i shares[i] * maps[i].

    Args:
        shares: (n,).
        maps: n maps of one shape.
    """
    first = maps[0]
    same = all(one.dtype == first.dtype and one.stride() == first.stride() for one in maps)
    recorded = torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_compiling()
    if same and not recorded and (first.is_cuda or has_fast_layout(first)):
        return _WeightedSum.apply(shares, *maps)
    # A 0-dim factor does not promote the maps, so half precision stays half precision.
    return sum((shares[i] * maps[i] for i in range(1, len(maps))), start=shares[0] * first)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shares: Tensor, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(shares, *maps)
        with torch.autocast(shares.device.type, enabled=False):
            return _sum_in_place(_factors(shares), maps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shares, *maps = ctx.saved_tensors
        if not grad.is_cuda:
            grad = grad.contiguous(memory_format=torch.channels_last)
        of_shares = None
        if ctx.needs_input_grad[0]:
            of_shares = torch.stack([_dot(grad, one) for one in maps]).to(shares.dtype)
        of_maps = [
            grad * share if needed else None
            for share, needed in zip(_factors(shares), ctx.needs_input_grad[1:])
        ]
        return of_shares, *of_maps


def _factors(shares: Tensor) -> list[Any]:
    """Numbers; of a GPU, which would have to be waited for, tensors of one."""
    return list(shares.unbind()) if shares.is_cuda else shares.tolist()


def _sum_in_place(factors: Sequence[Any], maps: Sequence[Tensor]) -> Tensor:
    total = maps[0] * factors[0]
    for factor, one in zip(factors[1:], maps[1:]):
        if isinstance(factor, Tensor):
            total.addcmul_(one, factor)
        else:
            total.add_(one, alpha=factor)
    return total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over all products of two maps, in float32 at least."""
    if a.is_cuda or a.dtype not in (torch.float32, torch.float64):
        return (a * b).sum(dtype=torch.promote_types(a.dtype, torch.float32))
    return torch.dot(*(one.permute(0, 2, 3, 1).reshape(-1) for one in (a, b)))  # with channels last
