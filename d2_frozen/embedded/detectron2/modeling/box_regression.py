"""How is a box written as a correction of another box, and what does a wrong correction cost?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

from detectron2._outside import outside_subset
from detectron2.layers import cat, ciou_loss, diou_loss
from detectron2.structures import Boxes

__getattr__ = outside_subset(__name__, ("Box2BoxTransformRotated",))

__all__ = ["Box2BoxTransform", "Box2BoxTransformLinear"]

# The largest log of a growth in width or height: from 16 pixels to 1000. More overflows early in training.
_DEFAULT_SCALE_CLAMP = math.log(1000.0 / 16)


class Box2BoxTransform:
    """Deltas (dx, dy, dw, dh) of R-CNN (arXiv:1311.2524, appendix C).

    The centre moves by (dx * width, dy * height) of the source box; its sides grow by exp(dw) and exp(dh).
    """

    def __init__(
        self, weights: tuple[float, float, float, float], scale_clamp: float = _DEFAULT_SCALE_CLAMP
    ) -> None:
        """
        Args:
            weights: factors on the four deltas. Fast R-CNN's (10, 10, 5, 5) bring them to about unit
                variance.
            scale_clamp: dw and dh (without their weight) count as this at most.
        """
        self.weights = weights
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Deltas that turn the source boxes into the target boxes.

        Args:
            src_boxes, target_boxes: (N, 4) XYXY.
        Returns:
            (N, 4).
        Raises:
            AssertionError: a source box without width.
        """
        assert isinstance(src_boxes, Tensor), f"src_boxes must be a tensor, not {type(src_boxes).__name__}"
        assert isinstance(target_boxes, Tensor), (
            f"target_boxes must be a tensor, not {type(target_boxes).__name__}"
        )
        src_center, src_size = _center_and_size(src_boxes)
        target_center, target_size = _center_and_size(target_boxes)
        assert (src_size[:, 0] > 0).all().item(), "Box2BoxTransform.get_deltas: a source box has no width"
        wx, wy, ww, wh = self.weights
        moved = target_center - src_center
        grown = target_size / src_size
        return torch.stack(
            (
                wx * moved[:, 0] / src_size[:, 0],
                wy * moved[:, 1] / src_size[:, 1],
                ww * torch.log(grown[:, 0]),
                wh * torch.log(grown[:, 1]),
            ),
            dim=1,
        )

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Move and resize boxes.

        Args:
            deltas: (N, 4 * k), k corrections of each box, e.g. one per class.
            boxes: (N, 4) XYXY.
        Returns:
            (N, 4 * k) XYXY, float32 at least.
        """
        deltas = deltas.float()  # exp() and large coordinates do not fit half floats
        center, size = _center_and_size(boxes.to(deltas.dtype))
        wx, wy, ww, wh = self.weights
        new_cx = deltas[:, 0::4] / wx * size[:, :1] + center[:, :1]
        new_cy = deltas[:, 1::4] / wy * size[:, 1:] + center[:, 1:]
        half_w = 0.5 * (torch.exp((deltas[:, 2::4] / ww).clamp(max=self.scale_clamp)) * size[:, :1])
        half_h = 0.5 * (torch.exp((deltas[:, 3::4] / wh).clamp(max=self.scale_clamp)) * size[:, 1:])
        corners = torch.stack((new_cx - half_w, new_cy - half_h, new_cx + half_w, new_cy + half_h), dim=2)
        return corners.reshape(deltas.shape)


class Box2BoxTransformLinear:
    """Distances (left, top, right, bottom) of the sides from the source centre (FCOS, arXiv:1904.01355)."""

    def __init__(self, normalize_by_size: bool = True) -> None:
        """
        Args:
            normalize_by_size: distances in units of the source box's width and height; else in pixels.
        """
        self.normalize_by_size = normalize_by_size

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """(N, 4) distances of the target's sides, negative where the centre lies outside."""
        center, size = 0.5 * (src_boxes[:, :2] + src_boxes[:, 2:]), src_boxes[:, 2:] - src_boxes[:, :2]
        distances = torch.cat((center - target_boxes[:, :2], target_boxes[:, 2:] - center), dim=1)
        return distances / torch.cat((size, size), dim=1) if self.normalize_by_size else distances

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes (N, 4 * k) XYXY from distances (N, 4 * k), negative ones as 0, and source boxes (N, 4)."""
        at_least_float32 = torch.promote_types(deltas.dtype, torch.float32)
        distances = deltas.to(at_least_float32).relu().unflatten(1, (-1, 4))  # (N, k, 4)
        boxes = boxes.to(distances.dtype)
        center, size = 0.5 * (boxes[:, :2] + boxes[:, 2:]), boxes[:, 2:] - boxes[:, :2]
        if self.normalize_by_size:
            distances = distances * torch.cat((size, size), dim=1)[:, None]
        near = center[:, None] - distances[..., :2]
        far = center[:, None] + distances[..., 2:]
        return torch.cat((near, far), dim=2).flatten(1)


def _dense_box_regression_loss(
    anchors: list[Boxes | Tensor],
    box2box_transform: Box2BoxTransform | Box2BoxTransformLinear,
    pred_anchor_deltas: list[Tensor],
    gt_boxes: list[Tensor],
    fg_mask: Tensor,
    box_reg_loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> Tensor:
    """Summed loss of the boxes predicted at all foreground anchors; the caller normalises it.

    Args:
        anchors: per feature map (A_l, 4); together A.
        pred_anchor_deltas: per feature map (B, A_l, 4).
        gt_boxes: per image (A, 4), the box that each anchor is matched to; background rows are not read.
        fg_mask: (B, A) bool.
        box_reg_loss_type: "smooth_l1" (on deltas), or "giou", "diou", "ciou" (on boxes).
        smooth_l1_beta: where smooth L1 turns from square to linear; 0 is L1.
    """
    per_map = [a.tensor if isinstance(a, Boxes) else a for a in anchors]
    # Everything below is per anchor, so only the foreground, some hundred of many thousand, is computed.
    image_index, anchor_index = fg_mask.nonzero(as_tuple=True)
    source = cat(per_map)[anchor_index]
    target = torch.stack(gt_boxes)[image_index, anchor_index]
    deltas = cat(pred_anchor_deltas, dim=1)[image_index, anchor_index]

    if box_reg_loss_type == "smooth_l1":
        wanted = box2box_transform.get_deltas(source, target)
        return smooth_l1_loss(deltas, wanted, beta=smooth_l1_beta, reduction="sum")
    if box_reg_loss_type not in _LOSSES_ON_BOXES:
        raise ValueError(
            f"box regression loss {box_reg_loss_type!r} is unknown; "
            f"choose one of smooth_l1, {', '.join(_LOSSES_ON_BOXES)}"
        )
    predicted = box2box_transform.apply_deltas(deltas, source)
    return _LOSSES_ON_BOXES[box_reg_loss_type](predicted, target, reduction="sum")


_LOSSES_ON_BOXES: dict[str, Callable[..., Tensor]] = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 4) XYXY -> centre (N, 2) and (width, height) (N, 2)."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * size, size
