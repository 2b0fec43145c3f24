"""Which of the many labelled boxes does the loss look at? A random, bounded and balanced choice."""

from __future__ import annotations

import torch
from torch import Tensor

from detectron2.layers import nonzero_tuple

__all__ = ["subsample_labels"]


def subsample_labels(
    labels: Tensor, num_samples: int, positive_fraction: float, bg_label: int
) -> tuple[Tensor, Tensor]:
    """Draw foreground and background entries.

    Args:
        labels: (N,), -1 ignored, ``bg_label`` background, anything else foreground.
        num_samples: how many in all; background fills up what foreground leaves.
        positive_fraction: how much of it may be foreground, in 0..1.
        bg_label: value of the background.
    Returns:
        Long indices of the drawn foreground and background, random order. Both come from torch's global
        generator of the device of ``labels``: the permutation of the foreground first, then that of the
        background.
    """
    is_background = labels == bg_label
    foreground = nonzero_tuple((labels != -1) & ~is_background)[0]
    background = nonzero_tuple(is_background)[0]
    num_foreground = min(foreground.numel(), int(num_samples * positive_fraction))
    num_background = min(background.numel(), num_samples - num_foreground)
    return _draw(foreground, num_foreground), _draw(background, num_background)


def _draw(candidates: Tensor, count: int) -> Tensor:
    # The whole permutation, also for few draws: so a seed gives the same choice as in Detectron2.
    return candidates[torch.randperm(candidates.numel(), device=candidates.device)[:count]]
