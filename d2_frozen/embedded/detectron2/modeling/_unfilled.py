"""A linear layer whose start values are drawn by somebody else, without computing torch's own first.

A seed gives the same model as the original's only if every random number is drawn in the same order, and so those of
torch's start values are, although they are overwritten at once. For the millions of a box head that takes a tenth of
the time of building a model; drawing without computing and storing takes half of it.
"""

from __future__ import annotations

import torch
from torch import nn

_AT_ONCE = 2**16


def unfilled_linear(in_features: int, out_features: int) -> nn.Linear:
    """nn.Linear with arbitrary values; torch's generator is where nn.Linear would have left it."""
    if torch.get_default_dtype() != torch.float32 or torch.empty(0).device.type != "cpu":
        return nn.Linear(in_features, out_features)  # draws another number of times, or elsewhere
    layer = nn.utils.skip_init(nn.Linear, in_features, out_features)
    pass_over_draws(sum(p.numel() for p in layer.parameters()))
    return layer


def pass_over_draws(count: int) -> None:
    """Move torch's CPU generator on by as many draws as ``count`` float32 values from a uniform distribution."""
    scrap = torch.empty(min(count, _AT_ONCE), dtype=torch.uint8)
    for start in range(0, count, _AT_ONCE):
        scrap[: count - start].random_()
