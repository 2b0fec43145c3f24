"""Non-maximum suppression of axis-aligned boxes, by torchvision."""

from __future__ import annotations

import torchvision.ops
from torch import Tensor
from torchvision.ops import nms

from detectron2._outside import outside_subset

__getattr__ = outside_subset(__name__, ("nms_rotated", "batched_nms_rotated"))

__all__ = ["batched_nms", "nms"]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """NMS within each group (class, or pyramid level).

    Args:
        boxes: (N, 4) XYXY; computed in float32, as half floats cannot hold large coordinates.
        scores: (N,).
        idxs: (N,) group of each box.
        iou_threshold: of two boxes of a group with a larger IoU, the one with the lower score goes.
    Returns:
        Long indices of the boxes that stay, highest score first.
    """
    assert boxes.shape[-1] == 4, f"boxes have 4 coordinates, got shape {boxes.shape}"
    return torchvision.ops.batched_nms(boxes.float(), scores, idxs, iou_threshold)
