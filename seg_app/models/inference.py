"""From classes and masks of queries to instances (arXiv 2107.06278, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances


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
