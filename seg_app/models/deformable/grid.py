"""Deformable attention in plain PyTorch, on any device: one grid_sample per level.

Shapes as in :func:`seg_app.models.deformable.deformable_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_by_grid_sample(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Every (image, head) pair is one image of grid_sample, with D channels and an Lq x P grid.

    Half precision is computed in that of the locations: 8 bits cannot tell the cells of a large map apart.
    """
    B, _, M, D = value.shape
    given, value = value.dtype, value.to(torch.promote_types(value.dtype, locations.dtype))
    Lq, P = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Lq, L, P, 2), -1..1
    shares = weights.transpose(1, 2).flatten(0, 1)  # (B*M, Lq, L, P)
    total = value.new_zeros(B * M, D, Lq)
    of_level = value.split([h * w for h, w in shapes], dim=1)
    for level, ((h, w), cells) in enumerate(zip(shapes, of_level)):
        maps = cells.permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        sampled = F.grid_sample(
            maps, grids[:, :, level].to(maps.dtype), align_corners=False
        )  # (B*M, D, Lq, P)
        share = shares[:, :, level].to(maps.dtype)
        # P is small: a batched product over it would be slower than the sum.
        total = total + torch.stack([sampled[..., p] * share[:, None, :, p] for p in range(P)]).sum(0)
    return total.view(B, M * D, Lq).transpose(1, 2).to(given)
