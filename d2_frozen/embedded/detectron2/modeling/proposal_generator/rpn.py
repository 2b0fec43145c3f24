"""Region proposal network (Ren et al. 2015, arXiv:1506.01497) on one map or on a pyramid.

In: {"p2".."p6": (B, C, H/s, W/s)}.  Out: per image Instances with ``proposal_boxes`` (XYXY, pixels) and
``objectness_logits``; in training also loss_rpn_cls and loss_rpn_loc.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.layers._few_gradients import ConvOfFewGradients
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry

from .._lookup import registered
from ..anchor_generator import build_anchor_generator
from ..box_regression import Box2BoxTransform, _dense_box_regression_loss
from ..matcher import Matcher
from ..sampling import subsample_labels
from .build import PROPOSAL_GENERATOR_REGISTRY
from .proposal_utils import proposals_from_candidates, top_logits_per_level

RPN_HEAD_REGISTRY = Registry("RPN_HEAD")
RPN_HEAD_REGISTRY.__doc__ = """
Callables ``(cfg, input_shape: list[ShapeSpec]) -> nn.Module`` by the name in ``MODEL.RPN.HEAD_NAME``.
The module is called with a list of maps and returns (logits, deltas) as :class:`StandardRPNHead` does.
"""


def build_rpn_head(cfg, input_shape: list[ShapeSpec]) -> nn.Module:
    """Build ``MODEL.RPN.HEAD_NAME``."""
    return registered(RPN_HEAD_REGISTRY, cfg.MODEL.RPN.HEAD_NAME, "MODEL.RPN.HEAD_NAME")(cfg, input_shape)


@PROPOSAL_GENERATOR_REGISTRY.register()
class RPN(nn.Module):
    """Scores anchors, moves them, and keeps the best."""

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        head: nn.Module,
        anchor_generator: nn.Module,
        anchor_matcher: Matcher,
        box2box_transform: Box2BoxTransform,
        batch_size_per_image: int,
        positive_fraction: float,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float = 0.7,
        min_box_size: float = 0.0,
        anchor_boundary_thresh: float = -1.0,
        loss_weight: float | dict[str, float] = 1.0,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
    ):
        """
        Args:
            in_features: names of the maps, fine to coarse.
            head: list of maps -> (logits, deltas) per map.
            anchor_generator: list of maps -> Boxes per map.
            anchor_matcher: labels anchors 1 (object), 0 (background), -1 (do not use).
            box2box_transform: how four deltas move an anchor.
            batch_size_per_image: anchors that take part in the loss.
            positive_fraction: at most this part of them are objects.
            pre_nms_topk, post_nms_topk: (in training, at inference); see ``find_top_rpn_proposals``.
            nms_thresh: IoU.
            min_box_size: in pixels.
            anchor_boundary_thresh: anchors that reach further out of the image, in pixels, are not used
                in training; negative: use all.
            loss_weight: one for both losses, or by loss name.
            box_reg_loss_type: as ``_dense_box_regression_loss`` knows it.
            smooth_l1_beta: where smooth L1 turns from square to linear; 0 is plain L1.
        """
        super().__init__()
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.in_features = in_features
        self.box2box_transform = box2box_transform
        # Selection of proposals; the counts by self.training.
        self.pre_nms_topk = dict(zip((True, False), pre_nms_topk, strict=True))
        self.post_nms_topk = dict(zip((True, False), post_nms_topk, strict=True))
        self.min_box_size = float(min_box_size)
        self.nms_thresh = nms_thresh
        # Which anchors are trained on.
        self.anchor_matcher = anchor_matcher
        self.anchor_boundary_thresh = anchor_boundary_thresh
        self.positive_fraction = positive_fraction
        self.batch_size_per_image = batch_size_per_image
        # Losses.
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        weights_by_name = isinstance(loss_weight, dict)
        self.loss_weight = (
            loss_weight if weights_by_name else dict.fromkeys(("loss_rpn_cls", "loss_rpn_loc"), loss_weight)
        )

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        rpn = cfg.MODEL.RPN
        shapes = [input_shape[name] for name in rpn.IN_FEATURES]
        return {
            "in_features": rpn.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "head": build_rpn_head(cfg, shapes),
            "anchor_matcher": Matcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True),
            "box2box_transform": Box2BoxTransform(weights=rpn.BBOX_REG_WEIGHTS),
            "batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "anchor_boundary_thresh": rpn.BOUNDARY_THRESH,
            "loss_weight": {
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.BBOX_REG_LOSS_WEIGHT * rpn.LOSS_WEIGHT,
            },
            "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Propose boxes; in training also compare all anchors with the ground truth.

        Args:
            images: only their sizes are used.
            features: maps by name.
            gt_instances: per image, with ``gt_boxes``; needed in training.
        Returns:
            proposals per image, and the losses ({} at inference).
        """
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)
        raw_logits, raw_deltas = self.rpn_head(maps)
        box_dim = anchors[0].tensor.shape[1]
        # One row per anchor, in the order of the anchor generator: row, column, anchor of the cell.
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in raw_logits]  # (B, A_level)
        deltas = [
            x.unflatten(1, (-1, box_dim)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in raw_deltas
        ]  # (B, A_level, 4)

        losses = {}
        if self.training:
            if gt_instances is None:
                raise ValueError("RPN in training mode needs gt_instances; the batch has no 'instances'")
            labels, matched_boxes = self.label_and_sample_anchors(anchors, gt_instances)
            losses = self.losses(anchors, logits, labels, deltas, matched_boxes)
        return self.predict_proposals(anchors, logits, deltas, images.image_sizes), losses

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Say for each anchor of each image what it should be.

        Args:
            anchors: per level.
            gt_instances: per image, with ``gt_boxes``.
        Returns:
            per image int8 labels (A,): 1 object, 0 background, -1 not in the loss; and per image (A, 4) the
            true box that goes with the anchor, meaningful where the label is 1.
        """
        all_anchors = Boxes.cat(anchors)
        labels, matched_boxes = [], []
        for truth in gt_instances:
            overlaps = pairwise_iou(truth.gt_boxes, all_anchors)
            match, label = self.anchor_matcher(overlaps)
            label = label.to(device=all_anchors.tensor.device)
            del overlaps  # the largest tensor here
            if self.anchor_boundary_thresh >= 0:
                inside = all_anchors.inside_box(truth.image_size, self.anchor_boundary_thresh)
                label = label.masked_fill(~inside, -1)
            labels.append(self._subsample_labels(label))
            matched_boxes.append(
                truth.gt_boxes.tensor[match] if len(truth.gt_boxes) else torch.zeros_like(all_anchors.tensor)
            )
        return labels, matched_boxes

    def _subsample_labels(self, label: torch.Tensor) -> torch.Tensor:
        """Keep a random choice of the 0 and 1 in ``label``, in place; all others become -1."""
        objects, background = subsample_labels(label, self.batch_size_per_image, self.positive_fraction, 0)
        label.fill_(-1)
        label[objects] = 1
        label[background] = 0
        return label

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Binary cross entropy on the sampled anchors, box loss on those with an object.

        Both are sums divided by (images x batch_size_per_image), whatever was sampled.

        Args:
            anchors: per level.
            pred_objectness_logits: per level (B, A_level).
            gt_labels, gt_boxes: per image, from :meth:`label_and_sample_anchors`.
            pred_anchor_deltas: per level (B, A_level, 4).
        Returns:
            weighted loss_rpn_cls and loss_rpn_loc.
        """
        num_images = len(gt_labels)
        labels = torch.stack(gt_labels)  # (B, A)
        is_object, is_sampled = labels == 1, labels >= 0
        # One transfer to the host for both counts.
        num_objects, num_sampled = torch.stack([is_object.sum(), is_sampled.sum()]).tolist()
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", num_objects / num_images)
        storage.put_scalar("rpn/num_neg_anchors", (num_sampled - num_objects) / num_images)

        box_loss = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            is_object,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        object_loss = F.binary_cross_entropy_with_logits(
            torch.cat(pred_objectness_logits, dim=1)[is_sampled],
            labels[is_sampled].to(torch.float32),
            reduction="sum",
        )

        scale = 1.0 / (self.batch_size_per_image * num_images)
        found = {"loss_rpn_cls": object_loss * scale, "loss_rpn_loc": box_loss * scale}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in found.items()}

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Move the best anchors and keep the best boxes of them.

        No gradient passes: in training the second stage takes boxes as given (approximate joint training).
        """
        with torch.no_grad():
            logits, chosen = top_logits_per_level(pred_objectness_logits, self.pre_nms_topk[self.training])
            # Boxes are made only for anchors that were chosen.
            boxes = []
            for level_anchors, deltas, index in zip(anchors, pred_anchor_deltas, chosen):
                corners = level_anchors.tensor
                rows = index.unsqueeze(-1).expand(-1, -1, corners.shape[1])
                moved = self.box2box_transform.apply_deltas(
                    deltas.gather(1, rows).flatten(0, 1), corners[index.flatten()]
                )
                boxes.append(moved.view(*index.shape, -1))  # (B, k, 4)
            return proposals_from_candidates(
                boxes,
                logits,
                image_sizes,
                self.nms_thresh,
                self.post_nms_topk[self.training],
                self.min_box_size,
                self.training,
            )


class _HiddenConv(Conv2d, ConvOfFewGradients):
    """Detectron2's Conv2d; only anchors that were sampled send it a gradient."""


@RPN_HEAD_REGISTRY.register()
class StandardRPNHead(nn.Module):
    """3x3 convolutions with ReLU, then 1x1 for one logit and four deltas per anchor; shared by all levels."""

    @configurable
    def __init__(
        self, *, in_channels: int, num_anchors: int, box_dim: int = 4, conv_dims: Sequence[int] = (-1,)
    ):
        """
        Args:
            in_channels: of every map.
            num_anchors: per cell.
            box_dim: numbers per box.
            conv_dims: widths of the 3x3 convolutions; -1 keeps the width.
        Raises:
            ValueError: a width of 0, or below -1.
        """
        super().__init__()
        convs = []
        width = in_channels
        for conv_dim in conv_dims:
            if conv_dim < -1 or conv_dim == 0:
                raise ValueError(f"MODEL.RPN.CONV_DIMS: {list(conv_dims)}: each must be positive, or -1")
            out_width = width if conv_dim == -1 else conv_dim
            convs.append(self._get_rpn_conv(width, out_width))
            width = out_width
        if len(convs) == 1:
            self.conv: nn.Module = convs[0]
        else:
            self.conv = nn.Sequential()
            for i, conv in enumerate(convs):
                self.conv.add_module(f"conv{i}", conv)
        self.objectness_logits = ConvOfFewGradients(width, num_anchors, kernel_size=1)
        self.anchor_deltas = ConvOfFewGradients(width, num_anchors * box_dim, kernel_size=1)
        for module in (*convs, self.objectness_logits, self.anchor_deltas):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)

    def _get_rpn_conv(self, in_channels: int, out_channels: int) -> nn.Module:
        return _HiddenConv(
            in_channels, out_channels, kernel_size=3, padding=1, activation=nn.ReLU(inplace=True)
        )

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]) -> dict:
        # The head is shared, so every level must look the same to it.
        widths = {shape.channels for shape in input_shape}
        if len(widths) != 1:
            raise ValueError(f"RPN needs maps of equal width, MODEL.RPN.IN_FEATURES have {sorted(widths)}")
        generator = build_anchor_generator(cfg, input_shape)
        per_cell = set(generator.num_anchors)
        if len(per_cell) != 1:
            raise ValueError(
                f"RPN needs as many anchors per cell on every level, not {generator.num_anchors}"
            )
        return {
            "in_channels": widths.pop(),
            "num_anchors": per_cell.pop(),
            "box_dim": generator.box_dim,
            "conv_dims": cfg.MODEL.RPN.CONV_DIMS,
        }

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per map (B, C, h, w): logits (B, anchors, h, w) and deltas (B, anchors * box_dim, h, w)."""
        hidden = [self.conv(x) for x in features]
        return [self.objectness_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]
