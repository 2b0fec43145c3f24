"""Which of the RPN's boxes become proposals, and how ground truth joins them in training.

Selection (Faster R-CNN, arXiv:1506.01497, with the per-level rule of FPN, arXiv:1612.03144): the best
``pre_nms_topk`` of every level, clipped to the image; NMS within each level; the best ``post_nms_topk``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

# Logit of a box that is certainly an object; finite, since it may be averaged or passed to a sigmoid.
_CERTAIN_LOGIT = math.log((1.0 - 1e-10) / (1.0 - (1.0 - 1e-10)))


def find_top_rpn_proposals(
    proposals: list[torch.Tensor],
    pred_objectness_logits: list[torch.Tensor],
    image_sizes: Sequence[tuple[int, int]],
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Choose proposals for every image from the boxes of all levels.

    Args:
        proposals: per level (B, A_level, 4) boxes, XYXY in pixels.
        pred_objectness_logits: per level (B, A_level).
        image_sizes: (height, width) of each image without padding.
        nms_thresh: IoU above which the weaker box goes.
        pre_nms_topk: boxes per level and image before NMS.
        post_nms_topk: boxes per image after NMS, over all levels.
        min_box_size: sides shorter than this, in pixels after clipping, are dropped.
        training: non-finite values are an error then; at inference such boxes are dropped.
    Returns:
        per image Instances with ``proposal_boxes`` and ``objectness_logits``, best first.
    Raises:
        FloatingPointError: non-finite boxes or logits in training.
    """
    logits, chosen = top_logits_per_level(pred_objectness_logits, pre_nms_topk)
    boxes = [
        level_boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, level_boxes.shape[-1]))
        for level_boxes, index in zip(proposals, chosen)
    ]
    return proposals_from_candidates(
        boxes, logits, image_sizes, nms_thresh, post_nms_topk, min_box_size, training
    )


def top_logits_per_level(
    logits_per_level: list[torch.Tensor], topk: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per level the ``topk`` best of (B, A_level) logits: values and indices, each (B, at most topk)."""
    best = [logits.topk(_at_most(topk, logits.shape[1]), dim=1) for logits in logits_per_level]
    return [b.values for b in best], [b.indices for b in best]


def _at_most(count: int, available: int) -> int:
    # In a trace the number of anchors is a tensor, and min() would make a constant of it.
    return available.clamp(max=count) if isinstance(available, torch.Tensor) else min(available, count)


def proposals_from_candidates(
    boxes_per_level: list[torch.Tensor],
    logits_per_level: list[torch.Tensor],
    image_sizes: Sequence[tuple[int, int]],
    nms_thresh: float,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Everything after the per-level choice: clip, filter, NMS, keep the best.

    Args:
        boxes_per_level: per level (B, k_level, 4) boxes, XYXY in pixels.
        logits_per_level: per level (B, k_level), best first.
        others, returns, raises: as in :func:`find_top_rpn_proposals`.
    """
    device = boxes_per_level[0].device
    counts = [logits.shape[1] for logits in logits_per_level]
    boxes = torch.cat(boxes_per_level, dim=1)  # (B, K, 4)
    logits = torch.cat(logits_per_level, dim=1)  # (B, K)
    # No list comprehension: in a trace, one that reads ``device`` crashes Python 3.13.0.
    level_of = torch.cat(
        tuple(torch.full((n,), i, dtype=torch.int64, device=device) for i, n in enumerate(counts))
    )

    # All images at once, and one transfer to the host instead of several per image.
    finite = boxes.isfinite().all(dim=2) & logits.isfinite()
    sizes = torch.stack([torch.as_tensor(size) for size in image_sizes])  # (B, height and width)
    limits = sizes[:, [1, 0, 1, 0]].to(boxes.dtype).to(device, non_blocking=True)
    boxes = torch.minimum(boxes.clamp(min=0), limits[:, None, :])
    sides = boxes[..., 2:] - boxes[..., :2]
    usable = finite & (sides > min_box_size).all(dim=2)
    all_finite, *all_usable = torch.cat([finite.all().reshape(1), usable.all(dim=1)]).tolist()
    if training and not all_finite:
        raise FloatingPointError(
            "The RPN predicted boxes or scores that are Inf or NaN: training has diverged. "
            "Try a smaller SOLVER.BASE_LR, a longer warm-up or SOLVER.CLIP_GRADIENTS."
        )

    results = []
    for i, image_size in enumerate(image_sizes):
        image_boxes, image_logits, image_levels = boxes[i], logits[i], level_of
        if torch.jit.is_tracing() or not all_usable[i]:
            image_boxes, image_logits, image_levels = (
                t[usable[i]] for t in (image_boxes, image_logits, image_levels)
            )
        kept = batched_nms(image_boxes, image_logits, image_levels, nms_thresh)[:post_nms_topk]
        found = Instances(image_size)
        found.proposal_boxes = Boxes(image_boxes[kept])
        found.objectness_logits = image_logits[kept]
        results.append(found)
    return results


def add_ground_truth_to_proposals(
    gt: Sequence[Instances] | Sequence[Boxes], proposals: Sequence[Instances]
) -> list[Instances]:
    """Append the true boxes of each image to its proposals.

    A second stage then sees good boxes from the first iteration on.

    Args:
        gt: per image Instances with ``gt_boxes``, or Boxes.
        proposals: per image Instances with ``proposal_boxes`` and ``objectness_logits``.
    Returns:
        new Instances with the fields of ``proposals``; true boxes come last, with a logit for certainty.
    """
    if len(gt) != len(proposals):
        raise ValueError(f"ground truth of {len(gt)} images for proposals of {len(proposals)}")
    if not proposals:
        return list(proposals)
    return [add_ground_truth_to_proposals_single_image(g, p) for g, p in zip(gt, proposals)]


def add_ground_truth_to_proposals_single_image(gt: Instances | Boxes, proposals: Instances) -> Instances:
    """:func:`add_ground_truth_to_proposals` for one image.

    Raises:
        AssertionError: the proposals have a field which the ground truth cannot fill.
    """
    device = proposals.objectness_logits.device
    known = {"gt_boxes": gt} if isinstance(gt, Boxes) else gt.get_fields()
    as_proposals = Instances(proposals.image_size, **known)
    as_proposals.proposal_boxes = known["gt_boxes"].to(device)
    as_proposals.objectness_logits = torch.full((len(as_proposals),), _CERTAIN_LOGIT, device=device)
    missing = [name for name in proposals.get_fields() if not as_proposals.has(name)]
    assert not missing, f"proposals have the fields {missing}, which ground truth boxes do not have"
    # The first one decides which fields the result has.
    return Instances.cat([proposals, as_proposals])
