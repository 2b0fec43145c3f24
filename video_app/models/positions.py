"""Learned positions of a clip's cells: one vector per moment plus one per place, for clips of any size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ClipPositions(nn.Module):
    """
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
        for table in (self.time, self.place):
            nn.init.trunc_normal_(table.weight, std=0.02)

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
