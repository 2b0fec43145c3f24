"""Learned positions of a clip's cells: one vector per moment plus one per place, for clips of any size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClipPositions(nn.Module):
    """They start as sines and cosines: near cells start alike, and order can be told from the first step on. With small
    random vectors, heads on the generated clips were still at chance when these were well above it.

    Args:
        frames, height, width: the native size, that of training clips, in frames and cells.
        channels: of the cells.
    """

    def __init__(self, frames: int, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.size = (frames, height, width)
        # Embeddings, since these have a weight decay of their own: SOLVER.WEIGHT_DECAY_EMBED.
        self.time = nn.Embedding(frames, channels)
        self.place = nn.Embedding(height * width, channels)
        rows, columns = sines(height, channels // 2), sines(width, channels - channels // 2)
        grid = (height, width, -1)
        place = torch.cat([rows[:, None].expand(grid), columns[None].expand(grid)], dim=-1)
        with torch.no_grad():
            self.time.weight.copy_(sines(frames, channels))
            self.place.weight.copy_(place.flatten(0, 1))

    def forward(self, frames: int, height: int, width: int) -> Tensor:
        """(frames, height, width, channels). At the native size the tables as they are; else interpolated, linear in
        time and bicubic in space: the clip then spans the same time and the same picture in finer or coarser steps.
        """
        time, place = self.time.weight, self.place.weight.unflatten(0, self.size[1:])
        if frames != self.size[0]:
            time = F.interpolate(time.T[None].float(), frames, mode="linear", align_corners=False)[0].T
        if (height, width) != self.size[1:]:
            table = place.permute(2, 0, 1)[None].float()
            table = F.interpolate(table, (height, width), mode="bicubic", align_corners=False, antialias=True)
            place = table[0].permute(1, 2, 0)
        return time[:, None, None] + place


def sines(count: int, channels: int) -> Tensor:
    """(count, channels): sines, then cosines, of wavelengths from 4 steps to 4 times ``count``, in equal ratios."""
    waves = max(1, channels // 2)
    lengths = 4.0 * float(count) ** (torch.arange(waves) / max(1, waves - 1))
    phases = 2 * math.pi * torch.arange(count)[:, None] / lengths
    return F.pad(torch.cat([phases.sin(), phases.cos()], dim=1), (0, channels))[:, :channels]
