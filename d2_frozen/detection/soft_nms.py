"""Which of many overlapping detections stay? Soft-NMS: none is dropped at once, their scores fall.

In: scored boxes of one image.  Out: the same boxes with lower scores, best first.
Method: Bodla et al., "Soft-NMS", ICCV 2017, arXiv 1704.04503, section 3: the best detection left is kept, and the
score s of every other one of its class becomes

    linear    s (1 - IoU) if IoU >= threshold else s
    gaussian  s exp(-IoU^2 / sigma)

until the scores left are below a minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.structures import Instances

METHODS = ("linear", "gaussian")
NMS_TYPES = ("nms", *(f"soft_nms_{method}" for method in METHODS))
# Rounds between two looks at whether anything is left; each look waits for the accelerator.
_ROUNDS_BETWEEN_CHECKS = 16


@dataclass(frozen=True)
class SoftNMS:
    """Soft-NMS of detections, by config.

    ``method``: see the top of the file; ``iou_threshold`` is for "linear", ``sigma`` for "gaussian". Detections whose
    score falls below ``min_score`` are dropped; ``topk`` is the number kept per image, negative for all.
    """

    method: str
    iou_threshold: float = 0.5
    sigma: float = 0.5
    min_score: float = 0.001
    topk: int = -1

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SoftNMS | None:
        """From MODEL.ROI_HEADS.NMS_TYPE and its neighbours; None for hard NMS.

        Raises:
            ValueError: no such type, or values out of range.
        """
        opts = cfg.MODEL.ROI_HEADS
        if opts.NMS_TYPE not in NMS_TYPES:
            raise ValueError(
                f"MODEL.ROI_HEADS.NMS_TYPE is {opts.NMS_TYPE!r}; choose one of {', '.join(NMS_TYPES)}."
            )
        if opts.NMS_TYPE == "nms":
            return None
        if opts.SOFT_NMS_SIGMA <= 0 or opts.SOFT_NMS_MIN_SCORE < 0:
            raise ValueError(
                f"MODEL.ROI_HEADS.SOFT_NMS_SIGMA is {opts.SOFT_NMS_SIGMA}, SOFT_NMS_MIN_SCORE "
                f"{opts.SOFT_NMS_MIN_SCORE}; the first must be above 0, the second not below."
            )
        return cls(
            method=opts.NMS_TYPE.removeprefix("soft_nms_"),
            iou_threshold=opts.NMS_THRESH_TEST,
            sigma=opts.SOFT_NMS_SIGMA,
            min_score=opts.SOFT_NMS_MIN_SCORE,
            topk=cfg.TEST.DETECTIONS_PER_IMAGE,
        )

    def __call__(self, detections: Instances) -> Instances:
        """One image's ``pred_boxes``, ``scores``, ``pred_classes`` -> those kept, with new scores, best first."""
        kept, scores = soft_nms(
            detections.pred_boxes.tensor,
            detections.scores,
            detections.pred_classes,
            method=self.method,
            iou_threshold=self.iou_threshold,
            sigma=self.sigma,
            min_score=self.min_score,
            topk=self.topk,
        )
        result = detections[kept]
        result.scores = scores
        return result


@torch.no_grad()
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    method: str,
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    min_score: float = 0.001,
    topk: int = -1,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS within each class; exact.

    Detections leave in falling order of their new scores, so ``topk`` rounds are enough, each over all boxes: rounds do
    not depend on the number of classes, and none waits for the accelerator.

    Args:
        boxes: (N, 4) XYXY.
        scores: (N,).
        classes: (N,) integers.
        method, iou_threshold, sigma: see the top of the file.
        min_score: detections whose new score is below are dropped.
        topk: how many to return; negative for all.
    Returns:
        (n,) indices of what is kept, and (n,) new scores, best first.
    Raises:
        ValueError: no such method.
    """
    if method not in METHODS:
        raise ValueError(f"Soft-NMS method {method!r}; choose {' or '.join(METHODS)}.")
    num = len(scores)
    rounds = num if topk < 0 else min(topk, num)
    if rounds == 0:
        return classes.new_zeros(0, dtype=torch.int64), scores.new_zeros(0)
    boxes, left = boxes.float(), scores.float().clone()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    chosen, new_scores = [], []
    for done in range(rounds):
        if done % _ROUNDS_BETWEEN_CHECKS == 0 and done and not bool((left >= min_score).any()):
            break
        # argmax, not max: of equal scores the first, so that results repeat.
        best = left.argmax(dim=0, keepdim=True)
        chosen.append(best)
        new_scores.append(left[best])
        iou = _iou(boxes[best], areas[best], boxes, areas)
        if method == "linear":
            factor = torch.where(iou >= iou_threshold, 1 - iou, 1.0)
        else:
            factor = torch.exp(-iou.square() / sigma)
        # Boxes that are taken have -1 and keep it.
        falls = (classes == classes[best]) & (left >= 0)
        left = torch.where(falls, left * factor, left).index_fill_(0, best, -1.0)

    indices, values = torch.cat(chosen), torch.cat(new_scores)
    enough = (values >= max(min_score, 0.0)).sum()  # they fall, so those that are high enough come first
    return indices[:enough], values[:enough].to(scores.dtype)


def _iou(one: Tensor, its_area: Tensor, boxes: Tensor, areas: Tensor) -> Tensor:
    """IoU of one box (1, 4) with all (N, 4) -> (N,)."""
    sides = torch.minimum(one[:, 2:], boxes[:, 2:]) - torch.maximum(one[:, :2], boxes[:, :2])
    shared = sides.clamp(min=0).prod(dim=1)
    return shared / (its_area + areas - shared).clamp(min=1e-12)
