"""What happens to the proposals: labelling, sampling, pooling, and the heads for boxes and masks.

In: proposals per image and feature maps.  Out: losses in training, detections per image at inference.
K is the number of object classes; class K is the background. Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detectron2._outside import outside_subset
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry

from .._lookup import refuse, registered
from ..backbone.resnet import BottleneckBlock, ResNet
from ..matcher import Matcher
from ..poolers import ROIPooler
from ..proposal_generator.proposal_utils import add_ground_truth_to_proposals
from ..sampling import subsample_labels
from .box_head import build_box_head
from .fast_rcnn import FastRCNNOutputLayers
from .mask_head import build_mask_head

__getattr__ = outside_subset(__name__, ("select_proposals_with_visible_keypoints",))

ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
ROI_HEADS_REGISTRY.__doc__ = """
Callables ``(cfg, input_shape: dict[str, ShapeSpec]) -> ROIHeads`` by the name in ``MODEL.ROI_HEADS.NAME``.
"""

Features = dict[str, torch.Tensor]


def build_roi_heads(cfg, input_shape: dict[str, ShapeSpec]) -> ROIHeads:
    """Build ``MODEL.ROI_HEADS.NAME``."""
    name = cfg.MODEL.ROI_HEADS.NAME
    outside = ("RROIHeads", "PointRendROIHeads")
    return registered(ROI_HEADS_REGISTRY, name, "MODEL.ROI_HEADS.NAME", outside)(cfg, input_shape)


def select_foreground_proposals(
    proposals: list[Instances], bg_label: int
) -> tuple[list[Instances], list[torch.Tensor]]:
    """Per image the proposals that hold an object, and the (R,) mask that chose them.

    Args:
        proposals: with ``gt_classes``; ``bg_label`` is background and -1 is "do not use".
        bg_label: K.
    """
    if not isinstance(proposals, (list, tuple)) or not all(isinstance(p, Instances) for p in proposals):
        raise TypeError("select_foreground_proposals takes a list of Instances, one per image")
    masks = [(p.gt_classes != -1) & (p.gt_classes != bg_label) for p in proposals]
    return [p[mask.nonzero().squeeze(1)] for p, mask in zip(proposals, masks)], masks


class ROIHeads(nn.Module):
    """Base: labels and samples proposals. A subclass defines ``forward``."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        proposal_append_gt: bool = True,
    ):
        """
        Args:
            num_classes: K.
            batch_size_per_image: proposals sampled per image for training.
            positive_fraction: at most this part of them hold an object.
            proposal_matcher: labels proposals 1 (object), 0 (background), -1 (do not use).
            proposal_append_gt: add the true boxes to the proposals.
        """
        super().__init__()
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.proposal_matcher = proposal_matcher
        self.proposal_append_gt = proposal_append_gt

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        opts = cfg.MODEL.ROI_HEADS
        return {
            "num_classes": opts.NUM_CLASSES,
            "batch_size_per_image": opts.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": opts.POSITIVE_FRACTION,
            "proposal_append_gt": opts.PROPOSAL_APPEND_GT,
            "proposal_matcher": Matcher(
                opts.IOU_THRESHOLDS, opts.IOU_LABELS, allow_low_quality_matches=False
            ),
        }

    def _sample_proposals(
        self, matched_idxs: torch.Tensor, matched_labels: torch.Tensor, gt_classes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the proposals of one image that take part in the losses.

        Args:
            matched_idxs, matched_labels: (R,) from the matcher.
            gt_classes: (objects,).
        Returns:
            indices of the drawn proposals, those with an object first, and their classes.
        """
        classes = classes_of_matches(matched_idxs, matched_labels, gt_classes, self.num_classes)
        drawn = torch.cat(
            subsample_labels(classes, self.batch_size_per_image, self.positive_fraction, self.num_classes)
        )
        return drawn, classes[drawn]

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Choose the proposals to train on and give them the ground truth they match.

        Args:
            proposals: per image, with ``proposal_boxes`` and ``objectness_logits``.
            targets: per image, with ``gt_boxes``, ``gt_classes`` and other ``gt_*`` fields.
        Returns:
            per image the sample, with ``gt_classes`` (K is background) and, where the image has objects, all
            ``gt_*`` fields of the best matching object; those of background proposals mean nothing.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled = []
        for candidates, truth in zip(proposals, targets):
            overlaps = pairwise_iou(truth.gt_boxes, candidates.proposal_boxes)
            match, label = self.proposal_matcher(overlaps)
            drawn, classes = self._sample_proposals(match, label, truth.gt_classes)
            candidates = candidates[drawn]
            candidates.gt_classes = classes
            if len(truth) > 0:
                match = match[drawn]
                for name, value in truth.get_fields().items():
                    if name.startswith("gt_") and not candidates.has(name):
                        candidates.set(name, value[match])
            sampled.append(candidates)
        log_sample_counts("roi_head", sampled, self.num_classes)
        return sampled

    def forward(
        self,
        images: ImageList,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: the batch; the heads here do not look at it.
            features: maps by name.
            proposals: per image, with ``proposal_boxes`` and ``objectness_logits``.
            targets: ground truth per image; in training only.
        Returns:
            in training proposals and losses; at inference detections and {}.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")


def classes_of_matches(
    match: torch.Tensor, label: torch.Tensor, gt_classes: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """(R,) class of each proposal: its object's, ``num_classes`` for background, -1 for "do not use"."""
    if gt_classes.numel() == 0:
        return torch.full_like(match, num_classes)
    classes = gt_classes[match].masked_fill(label == 0, num_classes)
    return classes.masked_fill_(label == -1, -1)


def log_sample_counts(prefix: str, labelled: list[Instances], num_classes: int) -> None:
    """Log the mean number of object and background proposals per image, e.g. ``roi_head/num_fg_samples``."""
    total = sum(len(one) for one in labelled)
    # One transfer to the host for the whole batch.
    background = int((torch.cat([one.gt_classes for one in labelled]) == num_classes).sum())
    storage = get_event_storage()
    storage.put_scalar(f"{prefix}/num_fg_samples", (total - background) / len(labelled))
    storage.put_scalar(f"{prefix}/num_bg_samples", background / len(labelled))


def _pooler(part, strides: Sequence[int]) -> ROIPooler:
    """The pooler of one head; ``part`` is its config, e.g. cfg.MODEL.ROI_BOX_HEAD."""
    return ROIPooler(
        output_size=part.POOLER_RESOLUTION,
        scales=tuple(1.0 / stride for stride in strides),
        sampling_ratio=part.POOLER_SAMPLING_RATIO,
        pooler_type=part.POOLER_TYPE,
    )


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(ROIHeads):
    """The heads of a C4 network: the last ResNet stage runs on every box, then box and mask predictors."""

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pooler: ROIPooler,
        res5: nn.Module,
        box_predictor: nn.Module,
        mask_head: nn.Module | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            in_features: names of the maps to pool from.
            pooler: maps and boxes -> (M, C, side, side).
            res5: what runs on the pooled features.
            box_predictor: on the mean of its output.
            mask_head: on its output; None for boxes only.
            kwargs: for :class:`ROIHeads`.
        """
        super().__init__(**kwargs)
        self.in_features = in_features
        self.pooler = pooler
        self.res5 = nn.Sequential(*res5) if isinstance(res5, (list, tuple)) else res5
        self.box_predictor = box_predictor
        self.mask_on = mask_head is not None
        if mask_head is not None:
            self.mask_head = mask_head

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        refuse(cfg.MODEL.KEYPOINT_ON, "MODEL.KEYPOINT_ON: True (keypoint heads)")
        args = super().from_config(cfg)
        names = args["in_features"] = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if len(names) != 1:
            raise ValueError(f"Res5ROIHeads pools from one map, MODEL.ROI_HEADS.IN_FEATURES: {list(names)}")
        args["pooler"] = _pooler(cfg.MODEL.ROI_BOX_HEAD, [input_shape[names[0]].stride])
        args["res5"], channels = cls._build_res5_block(cfg)
        args["box_predictor"] = FastRCNNOutputLayers(cfg, ShapeSpec(channels=channels, height=1, width=1))
        if cfg.MODEL.MASK_ON:
            side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
            args["mask_head"] = build_mask_head(cfg, ShapeSpec(channels=channels, width=side, height=side))
        return args

    @classmethod
    def _build_res5_block(cls, cfg) -> tuple[nn.Sequential, int]:
        opts = cfg.MODEL.RESNETS
        refuse(
            bool(opts.DEFORM_ON_PER_STAGE[-1]), "deformable convolutions in the res5 stage of Res5ROIHeads"
        )
        widen = 2**3  # res5 relative to res2
        channels = opts.RES2_OUT_CHANNELS * widen
        blocks = ResNet.make_stage(
            BottleneckBlock,
            3,
            stride_per_block=[2, 1, 1],
            in_channels=channels // 2,
            bottleneck_channels=opts.NUM_GROUPS * opts.WIDTH_PER_GROUP * widen,
            out_channels=channels,
            num_groups=opts.NUM_GROUPS,
            norm=opts.NORM,
            stride_in_1x1=opts.STRIDE_IN_1X1,
        )
        return nn.Sequential(*blocks), channels

    def _shared_roi_transform(self, features: list[torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        return self.res5(self.pooler(features, boxes))

    def forward(
        self,
        images: ImageList,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        del images
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, _needed(targets))
        maps = [features[name] for name in self.in_features]
        box_features = self._shared_roi_transform(maps, [p.proposal_boxes for p in proposals])
        predictions = self.box_predictor(box_features.mean(dim=[2, 3]))
        if not self.training:
            detections, _ = self.box_predictor.inference(predictions, proposals)
            return self.forward_with_given_boxes(features, detections), {}

        losses = self.box_predictor.losses(predictions, proposals)
        if self.mask_on:
            with_objects, chosen = select_foreground_proposals(proposals, self.num_classes)
            # The box features are still there: the mask head takes the rows with an object.
            losses.update(self.mask_head(box_features[torch.cat(chosen)], with_objects))
        return [], losses

    def forward_with_given_boxes(self, features: Features, instances: list[Instances]) -> list[Instances]:
        """Add masks to detections (``pred_boxes``, ``pred_classes`` per image); inference only."""
        if self.training or not _have_boxes_and_classes(instances):
            raise ValueError("forward_with_given_boxes needs eval mode, pred_boxes and pred_classes")
        if not self.mask_on:
            return instances
        maps = [features[name] for name in self.in_features]
        x = self._shared_roi_transform(maps, [one.pred_boxes for one in instances])
        return self.mask_head(x, instances)


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(ROIHeads):
    """Box and mask heads with a pooler each, which share nothing but the maps and the proposals."""

    @configurable
    def __init__(
        self,
        *,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_in_features: list[str] | None = None,
        mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None,
        train_on_pred_boxes: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            box_in_features: names of the maps for the box head.
            box_pooler: maps and boxes -> (M, C, side, side).
            box_head: pooled features -> features for the predictor.
            box_predictor: as :class:`FastRCNNOutputLayers`.
            mask_in_features, mask_pooler, mask_head: the same for masks; without ``mask_pooler`` the mask
                head gets the maps themselves, by name.
            train_on_pred_boxes: train the mask head on predicted boxes instead of proposals.
            kwargs: for :class:`ROIHeads`.
        """
        keypoint_args = [name for name in kwargs if name.startswith("keypoint_")]
        given = [name for name in keypoint_args if kwargs.pop(name) is not None]
        refuse(bool(given), f"{', '.join(given)} of StandardROIHeads (keypoint heads)")
        super().__init__(**kwargs)
        self.train_on_pred_boxes = train_on_pred_boxes
        self.in_features = self.box_in_features = box_in_features
        self.keypoint_on, self.mask_on = False, mask_in_features is not None
        self.box_pooler, self.box_head, self.box_predictor = box_pooler, box_head, box_predictor
        if self.mask_on:
            self.mask_pooler, self.mask_head = mask_pooler, mask_head
            self.mask_in_features = mask_in_features

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        refuse(cfg.MODEL.KEYPOINT_ON, "MODEL.KEYPOINT_ON: True (keypoint heads)")
        args = super().from_config(cfg)
        args["train_on_pred_boxes"] = cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES
        # A subclass from before @configurable may build its heads in instance methods of these names.
        for hook in (cls._init_box_head, cls._init_mask_head):
            if inspect.ismethod(hook):
                args.update(hook(cfg, input_shape))
        return args

    @classmethod
    def _pooler_over(
        cls, cfg, part, input_shape: dict[str, ShapeSpec]
    ) -> tuple[list[str], ROIPooler, ShapeSpec]:
        """Names of the maps, a pooler over them, and the shape that it returns."""
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        widths = {input_shape[name].channels for name in names}
        if len(widths) != 1:
            raise ValueError(f"ROI heads need maps of equal width, MODEL.ROI_HEADS.IN_FEATURES have {widths}")
        side = part.POOLER_RESOLUTION
        pooled = ShapeSpec(channels=widths.pop(), height=side, width=side)
        return names, _pooler(part, [input_shape[name].stride for name in names]), pooled

    @classmethod
    def _init_box_head(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        names, pooler, pooled = cls._pooler_over(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        head = build_box_head(cfg, pooled)
        return {
            "box_in_features": names,
            "box_pooler": pooler,
            "box_head": head,
            "box_predictor": FastRCNNOutputLayers(cfg, head.output_shape),
        }

    @classmethod
    def _init_mask_head(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        if not cfg.MODEL.MASK_ON:
            return {}
        part = cfg.MODEL.ROI_MASK_HEAD
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        args: dict[str, Any] = {"mask_in_features": names}
        if part.POOLER_TYPE:
            _, args["mask_pooler"], head_input = cls._pooler_over(cfg, part, input_shape)
        else:
            args["mask_pooler"] = None
            head_input = {name: input_shape[name] for name in names}
        args["mask_head"] = build_mask_head(cfg, head_input)
        return args

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
            # Masks are for the final boxes, which are fewer and better than the proposals.
            return self.forward_with_given_boxes(features, detections), {}
        proposals = self.label_and_sample_proposals(proposals, _needed(targets))
        losses = self._forward_box(features, proposals)
        losses.update(self._forward_mask(features, proposals))
        losses.update(self._forward_keypoint(features, proposals))
        return proposals, losses

    def forward_with_given_boxes(self, features: Features, instances: list[Instances]) -> list[Instances]:
        """Add masks to detections (``pred_boxes``, ``pred_classes`` per image); inference only."""
        if self.training or not _have_boxes_and_classes(instances):
            raise ValueError("forward_with_given_boxes needs eval mode, pred_boxes and pred_classes")
        instances = self._forward_mask(features, instances)
        return self._forward_keypoint(features, instances)

    def _forward_box(self, features: Features, proposals: list[Instances]) -> Any:
        """Losses of labelled proposals in training, detections per image at inference."""
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, [p.proposal_boxes for p in proposals])
        predictions = self.box_predictor(self.box_head(pooled))
        del pooled  # at inference: 50 MB per thousand proposals
        if not self.training:
            detections, _ = self.box_predictor.inference(predictions, proposals)
            return detections
        losses = self.box_predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            with torch.no_grad():
                moved = self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
            for one, boxes in zip(proposals, moved):
                one.proposal_boxes = Boxes(boxes)
        return losses

    def _forward_mask(self, features: Features, instances: list[Instances]) -> Any:
        """Mask loss of labelled proposals in training; ``instances`` with ``pred_masks`` at inference."""
        if not self.mask_on:
            return {} if self.training else instances
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        if self.mask_pooler is None:
            return self.mask_head({name: features[name] for name in self.mask_in_features}, instances)
        boxes = [one.proposal_boxes if self.training else one.pred_boxes for one in instances]
        pooled = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        return self.mask_head(pooled, instances)

    def _forward_keypoint(self, features: Features, instances: list[Instances]) -> Any:
        """What heads without keypoints do: nothing. Subclasses written for Detectron2 call it."""
        return {} if self.training else instances


def _needed(targets: list[Instances] | None) -> list[Instances]:
    if targets is None or not all(one.has("gt_boxes") and one.has("gt_classes") for one in targets):
        raise ValueError(
            "ROI heads in training mode need targets with gt_boxes and gt_classes for every image"
        )
    return targets


def _have_boxes_and_classes(instances: Sequence[Instances]) -> bool:
    return all(one.has("pred_boxes") and one.has("pred_classes") for one in instances)
