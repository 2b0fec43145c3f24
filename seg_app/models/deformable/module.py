"""The attention layer around deformable attention: offsets and weights are linear in the query (arXiv 2010.04159).

Parameter names and start values are those of the public Deformable DETR and Mask2Former.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg_app.models.deformable.dispatch import deformable_attention


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (section 4.1, equation 3).

    Args:
        d_model: width C of queries, values and result.
        n_levels: L, number of maps.
        n_heads: M.
        n_points: P, sampling points per head and level.
    Raises:
        ValueError: d_model is no multiple of n_heads.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(
                f"the width {d_model} of deformable attention is no multiple of its {n_heads} heads."
            )
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        points = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, points * 2)
        self.attention_weights = nn.Linear(d_model, points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m looks into direction m: its P points lie 1, 2, .. P cells away, with equal weights."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # on the edge of a square, (M, 2)
        distances = torch.arange(1, self.n_points + 1)
        offsets = directions[:, None, None] * distances[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).flatten())

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query: (B, Lq, C).
            reference_points: (B or 1, Lq, L, 2) x, y in 0..1; offsets are in cells of the level. With a last
                dimension of 4, boxes x, y, width, height: offsets are in half boxes / P.
            memory: (B, S, C) all cells of all levels, S = sum of h*w.
            shapes: (h, w) of each level.
            padding_mask: (B, S), True where memory is padding and must read as zero.
        Returns:
            (B, Lq, C).
        """
        B, Lq, _ = query.shape
        M, L, P = self.n_heads, self.n_levels, self.n_points
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        both = F.linear(
            query,
            torch.cat((self.sampling_offsets.weight, self.attention_weights.weight)),
            torch.cat((self.sampling_offsets.bias, self.attention_weights.bias)),
        )
        offsets, weights = both.split((M * L * P * 2, M * L * P), dim=-1)
        offsets = offsets.reshape(B, Lq, M, L, P, 2)
        weights = weights.reshape(B, Lq, M, L * P).softmax(-1).view(B, Lq, M, L, P)
        points = reference_points[:, :, None, :, None]  # one for all heads and points
        if reference_points.shape[-1] == 4:
            locations = points[..., :2] + offsets * (points[..., 2:] * (0.5 / P))
        else:
            cell = _cell_sizes(tuple(map(tuple, shapes)), points.device, points.dtype)
            locations = torch.addcmul(points, offsets.to(points.dtype), cell)
        attended = deformable_attention(value.view(B, value.shape[1], M, -1), shapes, locations, weights)
        return self.output_proj(attended)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be needed in training later
def _cell_sizes(shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(L, 1, 2): width and height of a cell, where the level is 1 x 1."""
    return torch.tensor([[(1 / w, 1 / h)] for h, w in shapes], dtype=dtype, device=device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def cell_centres(shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Every cell of every level looks from its own centre: (1, S, L, 2) reference points, x, y in 0..1.

    The last few are kept; do not change them in place.
    """
    centres = []
    for h, w in shapes:
        y = (torch.arange(h, device=device, dtype=dtype) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=dtype) + 0.5) / w
        centres.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), dim=-1).view(-1, 2))
    return torch.cat(centres)[None, :, None].expand(1, -1, len(shapes), -1).contiguous()
