"""Box losses on IoU plus a distance term (Zheng et al., AAAI 2020, arXiv:1911.08287), by torchvision."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss


def diou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """1 - IoU + (centre distance / diagonal of the enclosing box)^2, equation 7.

    Args:
        boxes1, boxes2: (N, 4) XYXY with x0 <= x1 and y0 <= y1; not checked, as that would wait for the GPU.
        reduction: "none" (N,), "mean" (0 for no boxes) or "sum".
        eps: keeps divisions finite.
    """
    return distance_box_iou_loss(boxes1, boxes2, reduction=reduction, eps=eps)


def ciou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """DIoU plus a term for the aspect ratio, equations 8 to 11. Arguments as for ``diou_loss``."""
    return complete_box_iou_loss(boxes1, boxes2, reduction=reduction, eps=eps)
