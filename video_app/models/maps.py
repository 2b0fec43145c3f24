"""What of the backbone does a head see? Maps of every frame -> one grid of cells.

In: {"res5": (B, T, C, h, w), ...}.  Out: (B, T, h, w, C'), in the cells of the coarsest map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.layers import ShapeSpec


class MapsOfFrames(nn.Module):
    """One map as it is; several averaged down to the coarsest one's cells, normalised each, and concatenated.

    The maps of a network differ in scale and in channels, so that a sum would not do, and each has its own LayerNorm.

    Args:
        shapes: by name, what the head sees.
        width: channels that come out, by a linear layer; 0: those that went in, without it.
    """

    def __init__(self, shapes: Mapping[str, ShapeSpec], width: int = 0) -> None:
        super().__init__()
        self.names = list(shapes)
        self.coarsest = max(self.names, key=lambda name: shapes[name].stride)
        channels = {name: int(shape.channels) for name, shape in shapes.items()}
        self.norms = nn.ModuleDict(
            {name: nn.LayerNorm(count) for name, count in channels.items()} if len(channels) > 1 else {}
        )
        seen = sum(channels.values())
        self.projection = nn.Linear(seen, width) if width else nn.Identity()
        self.channels = width or seen

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Maps of (B, T, C, h, w), each in its own cells -> (B, T, h, w, channels)."""
        if not self.norms:
            return self.projection(maps[self.names[0]].movedim(2, -1))
        grid = maps[self.coarsest].shape[-2:]
        cells = [self.norms[name](_pooled(maps[name], grid).movedim(2, -1)) for name in self.names]
        return self.projection(torch.cat(cells, dim=-1))


def maps_seen(shapes: Mapping[str, ShapeSpec], in_features: Sequence[str]) -> dict[str, ShapeSpec]:
    """Those of MODEL.VIDEO_HEAD.IN_FEATURES; the last one where that is empty.

    Raises:
        ValueError: the backbone does not give one of them.
    """
    names = list(in_features) or list(shapes)[-1:]
    missing = [name for name in names if name not in shapes]
    if missing or len(set(names)) < len(names):
        raise ValueError(
            f"MODEL.VIDEO_HEAD.IN_FEATURES is {names}; the backbone gives {', '.join(shapes)}, each once. [] takes "
            "the last."
        )
    return {name: shapes[name] for name in names}


def _pooled(feature: Tensor, grid: Sequence[int]) -> Tensor:
    B, T = feature.shape[:2]
    return F.adaptive_avg_pool2d(feature.flatten(0, 1), tuple(grid)).unflatten(0, (B, T))
