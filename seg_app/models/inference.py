"""From classes and masks of queries to a class per pixel, or to instances (arXiv 2107.06278, section 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detectron2.structures import Boxes, Instances

# Full-size mask logits that are in memory at a time: 64 Mi numbers, 256 MiB in float32.
_NUMBERS_AT_ONCE = 1 << 26


def semantic_scores(logits: Tensor, masks: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Score of each class at each pixel: sum over queries of class probability times mask probability.

    Args:
        logits: (Q, K + 1); the last class, "no object", has no score.
        masks: (Q, h, w) logits.
        size: (H, W) to which mask logits are brought first (bilinear); by default they stay.
    Returns:
        (K, H, W) float32.
    """
    chances = logits.float().softmax(-1)[:, :-1]  # (Q, K)
    H, W = size or masks.shape[-2:]
    scores = chances.new_zeros(chances.shape[1], H * W)
    # Some queries at a time: at 4000 x 4000 pixels, 100 full-size masks are 6.4 GB.
    some = max(1, _NUMBERS_AT_ONCE // (H * W))
    for part, chance in zip(masks.float().split(some), chances.split(some)):
        if tuple(part.shape[-2:]) != (H, W):
            part = F.interpolate(part[None], size=(H, W), mode="bilinear", align_corners=False)[0]
        scores.addmm_(chance.t(), part.sigmoid().flatten(1))
    return scores.view(-1, H, W)


def fit_to(maps: Tensor, image_size: tuple[int, int], height: int, width: int) -> Tensor:
    """Cut the padding off (C, H, W) maps, and bring the image to height x width (bilinear)."""
    inner = maps[:, : image_size[0], : image_size[1]]
    if tuple(inner.shape[-2:]) == (height, width):
        return inner
    return F.interpolate(inner[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def top_instances(logits: Tensor, masks: Tensor, count: int) -> Instances:
    """The ``count`` best (query, class) pairs as instances.

    Args:
        logits: (Q, K + 1).
        masks: (Q, H, W) logits at the wanted size.
    Returns:
        Instances with ``pred_masks`` (n, H, W) float 0/1, ``pred_boxes`` (all zero; the masks say where), ``scores``
        (class probability times mean mask probability inside the mask), ``pred_classes``.
    """
    chances = logits.float().softmax(-1)[:, :-1]
    K = chances.shape[1]
    best, index = chances.flatten().topk(min(count, chances.numel()), sorted=False)
    queries, classes = index // K, index % K
    chosen = masks[queries].float()
    inside = (chosen > 0).float()
    quality = (chosen.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    result = Instances((masks.shape[-2], masks.shape[-1]))
    result.pred_masks = inside
    result.pred_boxes = Boxes(torch.zeros(len(inside), 4, device=masks.device))
    result.scores = best * quality
    result.pred_classes = classes
    return result
