"""Muon: momentum whose matrix update is made orthogonal (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon).

In: gradients of matrices.  Out: steps whose singular values are all near 1, scaled to AdamW's usual step size
(arXiv:2502.16982, equation 4).  torch.optim.Muon iterates in bfloat16, which CPUs without such units emulate
slowly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ITERATIONS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For 2-D parameters only. ``lr`` and ``weight_decay`` mean what they mean for AdamW."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            for weight, update in zip(
                weights, _orthogonal_updates([self._direction(w, group) for w in weights])
            ):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * max(weight.shape) ** 0.5 * group["lr"])

    def _direction(self, weight: nn.Parameter, group: dict) -> Tensor:
        mean = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        mean.lerp_(weight.grad, 1 - group["momentum"])
        return weight.grad.lerp(mean, group["momentum"])


def _orthogonal_updates(matrices: list[Tensor]) -> list[Tensor]:
    """Each process makes its share of the matrices orthogonal; a sum over processes brings them together."""
    if not dist.is_initialized():
        return [orthogonal(m) for m in matrices]
    rank, world = dist.get_rank(), dist.get_world_size()
    largest_first = sorted(range(len(matrices)), key=lambda i: -matrices[i].numel())
    owned = set(largest_first[rank::world])
    mine = [orthogonal(m) if i in owned else torch.zeros_like(m) for i, m in enumerate(matrices)]
    flat = torch.cat([m.flatten() for m in mine])
    dist.all_reduce(flat)
    return [part.view_as(m) for part, m in zip(flat.split([m.numel() for m in matrices]), matrices)]


def orthogonal(matrix: Tensor) -> Tensor:
    """Same singular vectors, singular values pushed to about 1, by a quintic Newton-Schulz iteration."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
