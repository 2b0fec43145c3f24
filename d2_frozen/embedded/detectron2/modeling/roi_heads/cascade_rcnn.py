"""Cascade R-CNN (Cai & Vasconcelos 2018, arXiv:1712.00726): box heads in a row, each refines boxes further.

In training each stage labels its input boxes with a stricter IoU; at inference the scores of all stages are
averaged and the boxes come from the last one. Masks are as in StandardROIHeads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage

from ..box_regression import Box2BoxTransform
from ..matcher import Matcher
from ..poolers import ROIPooler
from .box_head import build_box_head
from .fast_rcnn import FastRCNNOutputLayers, Predictions, fast_rcnn_inference
from .roi_heads import (
    ROI_HEADS_REGISTRY,
    Features,
    StandardROIHeads,
    _needed,
    classes_of_matches,
    log_sample_counts,
)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by ``scale``."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.scale, None


@ROI_HEADS_REGISTRY.register()
class CascadeROIHeads(StandardROIHeads):
    """StandardROIHeads with a list of box heads."""

    @configurable
    def __init__(
        self,
        *,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_heads: list[nn.Module],
        box_predictors: list[nn.Module],
        proposal_matchers: list[Matcher],
        **kwargs: Any,
    ):
        """
        Args:
            box_in_features, box_pooler: shared by all stages.
            box_heads, box_predictors: one per stage.
            proposal_matchers: one per stage; the first labels the proposals before sampling.
            kwargs: for :class:`StandardROIHeads`, without ``proposal_matcher``.
        Raises:
            ValueError: lists of different lengths, or a ``proposal_matcher``.
        """
        if "proposal_matcher" in kwargs:
            raise ValueError(
                "CascadeROIHeads takes proposal_matchers, one per stage, and no proposal_matcher"
            )
        if not len(box_heads) == len(box_predictors) == len(proposal_matchers):
            raise ValueError(
                f"{len(box_heads)} box heads, {len(box_predictors)} predictors and "
                f"{len(proposal_matchers)} matchers; a cascade needs as many of each"
            )
        super().__init__(
            box_in_features=box_in_features,
            box_pooler=box_pooler,
            box_head=nn.ModuleList(box_heads),
            box_predictor=nn.ModuleList(box_predictors),
            proposal_matcher=proposal_matchers[0],
            **kwargs,
        )
        self.proposal_matchers = proposal_matchers
        self.num_cascade_stages = len(box_heads)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        args = super().from_config(cfg, input_shape)
        del args["proposal_matcher"]
        return args

    @classmethod
    def _init_box_head(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise ValueError("CascadeROIHeads needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: True")
        if len(cascade.IOUS) != len(cascade.BBOX_REG_WEIGHTS):
            raise ValueError(
                f"MODEL.ROI_BOX_CASCADE_HEAD has {len(cascade.IOUS)} IOUS for "
                f"{len(cascade.BBOX_REG_WEIGHTS)} BBOX_REG_WEIGHTS"
            )
        if cascade.IOUS[0] != cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]:
            raise ValueError(
                f"the first of MODEL.ROI_BOX_CASCADE_HEAD.IOUS is {cascade.IOUS[0]}, "
                f"MODEL.ROI_HEADS.IOU_THRESHOLDS starts with {cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]}; "
                "the first stage needs them equal"
            )
        names, pooler, pooled = cls._pooler_over(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        heads, predictors = [], []
        for weights in cascade.BBOX_REG_WEIGHTS:
            heads.append(build_box_head(cfg, pooled))
            transform = Box2BoxTransform(weights=weights)
            predictors.append(FastRCNNOutputLayers(cfg, heads[-1].output_shape, box2box_transform=transform))
        return {
            "box_in_features": names,
            "box_pooler": pooler,
            "box_heads": heads,
            "box_predictors": predictors,
            "proposal_matchers": [
                Matcher([iou], [0, 1], allow_low_quality_matches=False) for iou in cascade.IOUS
            ],
        }

    def forward(
        self,
        images: ImageList,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """As in the base class."""
        del images
        if not self.training:
            detections = self._forward_box(features, proposals)
            return self.forward_with_given_boxes(features, detections), {}
        proposals = self.label_and_sample_proposals(proposals, _needed(targets))
        losses = self._forward_box(features, proposals, targets)
        # Masks learn from the proposals of the first stage.
        losses.update(self._forward_mask(features, proposals))
        losses.update(self._forward_keypoint(features, proposals))
        return proposals, losses

    def _forward_box(
        self, features: Features, proposals: list[Instances], targets: list[Instances] | None = None
    ) -> Any:
        """All stages: losses by name in training (``loss_cls_stage0``...), detections at inference."""
        maps = [features[name] for name in self.box_in_features]
        image_sizes = [p.image_size for p in proposals]
        outputs: list[tuple[nn.Module, Predictions, list[Instances]]] = []
        boxes: list[torch.Tensor] = []
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
                if self.training:
                    proposals = self._match_and_label_boxes(proposals, stage, targets)
            predictions = self._run_stage(maps, proposals, stage)
            # Always, also after the last stage: at inference these are the boxes of the detections.
            boxes = predictor.predict_boxes(predictions, proposals)
            outputs.append((predictor, predictions, proposals))

        if self.training:
            return self._losses_of_stages(outputs)
        per_stage = [predictor.predict_probs(*rest) for predictor, *rest in outputs]
        scores = [sum(of_image) * (1.0 / self.num_cascade_stages) for of_image in zip(*per_stage)]
        last = self.box_predictor[-1]
        limits = (last.test_score_thresh, last.test_nms_thresh, last.test_topk_per_image)
        detections, _ = fast_rcnn_inference(boxes, scores, image_sizes, *limits)
        return detections

    @staticmethod
    def _losses_of_stages(
        outputs: list[tuple[nn.Module, Predictions, list[Instances]]],
    ) -> dict[str, torch.Tensor]:
        losses = {}
        storage = get_event_storage()
        for stage, (predictor, predictions, proposals) in enumerate(outputs):
            with storage.name_scope(f"stage{stage}"):
                found = predictor.losses(predictions, proposals)
            losses.update({f"{name}_stage{stage}": loss for name, loss in found.items()})
        return losses

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        """Give all boxes of a later stage ``gt_classes`` and ``gt_boxes``, in place; nothing is sampled."""
        for one, truth in zip(proposals, targets):
            overlaps = pairwise_iou(truth.gt_boxes, one.proposal_boxes)
            match, label = self.proposal_matchers[stage](overlaps)
            one.gt_classes = classes_of_matches(match, label, truth.gt_classes, self.num_classes)
            if len(truth) > 0:
                one.gt_boxes = truth.gt_boxes[match]
            else:
                one.gt_boxes = Boxes(torch.zeros_like(one.proposal_boxes.tensor))
        log_sample_counts(f"stage{stage}/roi_head", proposals, self.num_classes)
        return proposals

    def _run_stage(self, features: list[torch.Tensor], proposals: list[Instances], stage: int) -> Predictions:
        """Pool, run the head of ``stage`` and predict."""
        pooled = self.box_pooler(features, [p.proposal_boxes for p in proposals])
        if self.training:
            # Every stage sends gradients to the same maps; their mean keeps the scale of a single head.
            pooled = _ScaleGradient.apply(pooled, 1.0 / self.num_cascade_stages)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _create_proposals_from_boxes(
        self, boxes: list[torch.Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Boxes (R, 4) per image -> proposals without gradient, clipped to the image.

        Empty boxes are dropped in training only: at inference every stage must score the same boxes.
        """
        proposals = []
        for corners, image_size in zip(boxes, image_sizes):
            clipped = Boxes(corners.detach())
            clipped.clip(image_size)
            if self.training:
                clipped = clipped[clipped.nonempty()]
            one = Instances(image_size)
            one.proposal_boxes = clipped
            proposals.append(one)
        return proposals
