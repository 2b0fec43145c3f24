"""Where is a cell? Sine and cosine of its row and column (arXiv 1706.03762, in two dimensions as in 2005.12872)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

TEMPERATURE = 10000
SCALE = 2 * math.pi


def sine_positions(h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """(channels, h, w) float32 positions of an h x w map; the first half of the channels is about the row."""
    rows, columns = _axis(h, channels, device), _axis(w, channels, device)
    return torch.cat((rows[:, :, None].expand(-1, -1, w), columns[:, None].expand(-1, h, -1)))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be needed in training later
def _axis(length: int, channels: int, device: torch.device) -> Tensor:
    """(channels / 2, length). Only this is kept: positions of large maps have hundreds of megabytes."""
    steps = torch.arange(1, length + 1, device=device, dtype=torch.float32)
    return sine_of_coordinates(steps[:, None], steps[:, None], length, length, channels)[
        : channels // 2, :, 0
    ]


def sine_of_coordinates(
    rows: Tensor, columns: Tensor, last_row: Tensor | int, last_column: Tensor | int, channels: int
) -> Tensor:
    """Positions of cells counted from 1, relative to the last ones.

    Args:
        rows, columns: (..., h, w) float32.
        last_row, last_column: what counts as the whole; broadcasts against them.
        channels: of the result, a multiple of 4: sine and cosine in turn, over channels / 4 wavelengths per axis.
    Returns:
        (..., channels, h, w).
    """
    if channels % 4:
        raise ValueError(f"two-dimensional sine positions need a width that divides by 4, not {channels}.")
    per_axis = channels // 2
    powers = torch.arange(per_axis // 2, device=rows.device, dtype=torch.float32) * (2 / per_axis)
    frequencies = TEMPERATURE**-powers
    axes = []
    for place, last in ((rows, last_row), (columns, last_column)):
        angles = (place / (last + 1e-6) * SCALE)[..., None] * frequencies  # (..., h, w, channels / 4)
        axes.append(torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2))
    return torch.cat(axes, dim=-1).movedim(-1, -3)
