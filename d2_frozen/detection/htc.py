"""ROI heads: Hybrid Task Cascade, where boxes and masks refine each other stage by stage.

In: proposals and pyramid maps.  Out: losses of every stage, or boxes with masks.
Method: Chen et al., "Hybrid Task Cascade for Instance Segmentation", CVPR 2019, arXiv 1901.07518, section 3. With maps
x, RoI pooling P, boxes r, and box head B, mask head M and 1x1 convolution G of stage t:

    r_t = B_t(P(x, r_{t-1}))                       as in Cascade R-CNN, arXiv 1712.00726
    m_t = M_t(F(P(x, r_t), f_{t-1}))               "Interleaved Execution": r_t, not r_{t-1}
    F(y, f_{t-1}) = y + G_t(f_{t-1})               "Mask Information Flow": f, what M has before its deconvolution
    P(x, r) + P(S(x), r) in place of P(x, r)       "Spatial Contexts from Segmentation", semantic.py; optional
    L = sum_t a_t (L_box_t + L_mask_t) + b L_seg   "Learning": a = 1, 0.5, 0.25

As in MMDetection's HTC: G is followed by a ReLU, f_{t-1} is computed on the RoIs of stage t, boxes are class-agnostic,
masks are not (MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK can say otherwise), b is 0.2; at test the scores of the stages
are averaged, and so are the masks that all mask heads predict in the final boxes. As in Detectron2's cascade, and other
than there: proposals are sampled once, before the first stage, and later stages label all of them.

    MODEL:
      ROI_HEADS: {NAME: HTCROIHeads}
      ROI_BOX_HEAD: {CLS_AGNOSTIC_BBOX_REG: True}
      # These are the defaults.
      ROI_BOX_CASCADE_HEAD: {IOUS: [0.5, 0.6, 0.7]}
      HTC: {STAGE_LOSS_WEIGHTS: [1.0, 0.5, 0.25], SEMANTIC_ON: False}

Parameters under ``roi_heads``, with t = 0, 1, 2: ``box_head.t`` and ``box_predictor.t`` as in CascadeROIHeads,
``mask_head.t.{mask_fcnN, deconv, predictor}`` as in Detectron2's mask head, ``mask_head.t.flow`` for t > 0,
``semantic_branch``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from d2_frozen.detection.semantic import SemanticBranch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.cascade_rcnn import CascadeROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.mask_head import (
    MaskRCNNConvUpsampleHead,
    mask_rcnn_inference,
    mask_rcnn_loss,
)
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage

Features = dict[str, Tensor]
# Under this name the semantic features travel with those of the pyramid.
_SEMANTIC = "semantic"


@ROI_HEADS_REGISTRY.register()
class HTCROIHeads(CascadeROIHeads):
    """Box and mask heads in a row, for any number of stages.

    Losses: ``loss_cls_stage0``, ``loss_box_reg_stage0``, ``loss_mask_stage0``, ... and ``loss_sem_seg``, all weighted.
    """

    @configurable
    def __init__(
        self,
        *,
        stage_loss_weights: Sequence[float],
        interleaved: bool = True,
        mask_info_flow: bool = True,
        vis_period: int = 0,
        semantic_branch: SemanticBranch | None = None,
        box_semantic_pooler: Any = None,
        mask_semantic_pooler: Any = None,
        **kwargs: Any,
    ):
        """
        Args:
            stage_loss_weights: one per stage.
            interleaved: mask heads work on the boxes that their stage has refined, not on those it was given.
            mask_info_flow: mask heads get the features of the one before.
            vis_period: > 0 to put pictures of masks into the EventStorage every so many iterations.
            semantic_branch: None for none; then no poolers either.
            box_semantic_pooler, mask_semantic_pooler: ROIPoolers of its map, with the output sizes of those for boxes
                and masks.
            kwargs: for CascadeROIHeads; ``mask_head`` is a ModuleList of :class:`HTCMaskHead`, one per stage.
        Raises:
            ValueError: not as many weights as stages.
        """
        super().__init__(**kwargs)
        if len(stage_loss_weights) != self.num_cascade_stages:
            raise ValueError(
                f"MODEL.HTC.STAGE_LOSS_WEIGHTS has {len(stage_loss_weights)} values for the {self.num_cascade_stages} "
                "stages of MODEL.ROI_BOX_CASCADE_HEAD.IOUS"
            )
        self.stage_loss_weights = tuple(stage_loss_weights)
        self.interleaved, self.mask_info_flow = interleaved, mask_info_flow
        self.vis_period = vis_period
        self.semantic_branch = semantic_branch
        if semantic_branch is not None:
            self.box_semantic_pooler, self.mask_semantic_pooler = box_semantic_pooler, mask_semantic_pooler

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        args = super().from_config(cfg, input_shape)
        own = cfg.MODEL.HTC
        args |= {
            "stage_loss_weights": own.STAGE_LOSS_WEIGHTS,
            "interleaved": own.INTERLEAVED,
            "mask_info_flow": own.MASK_INFO_FLOW,
            "vis_period": cfg.VIS_PERIOD,
        }
        if own.SEMANTIC_ON:
            branch = SemanticBranch.from_config(cfg, input_shape)
            args |= {
                "semantic_branch": branch,
                "box_semantic_pooler": _semantic_pooler(cfg.MODEL.ROI_BOX_HEAD, branch.stride),
                "mask_semantic_pooler": _semantic_pooler(cfg.MODEL.ROI_MASK_HEAD, branch.stride),
            }
        return args

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Detectron2's hook for the mask arguments: one pooler, a head per stage."""
        if not cfg.MODEL.MASK_ON:
            return {}
        part = cfg.MODEL.ROI_MASK_HEAD
        if part.NAME != "MaskRCNNConvUpsampleHead" or not part.POOLER_TYPE:
            raise ValueError(
                f"HTCROIHeads has mask heads of its own, after MODEL.ROI_MASK_HEAD.NAME: MaskRCNNConvUpsampleHead; "
                f"NAME is {part.NAME!r} and POOLER_TYPE {part.POOLER_TYPE!r}"
            )
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        side = part.POOLER_RESOLUTION
        pooled = ShapeSpec(channels=input_shape[names[0]].channels, height=side, width=side)
        num_stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
        return {
            "mask_in_features": names,
            "mask_pooler": ROIPooler(
                side,
                tuple(1.0 / input_shape[name].stride for name in names),
                part.POOLER_SAMPLING_RATIO,
                part.POOLER_TYPE,
            ),
            "mask_head": nn.ModuleList(
                HTCMaskHead(
                    pooled,
                    num_classes=1 if part.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
                    conv_dims=[part.CONV_DIM] * (part.NUM_CONV + 1),
                    conv_norm=part.NORM,
                    takes_flow=cfg.MODEL.HTC.MASK_INFO_FLOW and stage > 0,
                )
                for stage in range(num_stages)
            ),
        }

    def forward(
        self,
        images: ImageList,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As in Detectron2's heads. With a semantic branch, in training, ``images.sem_seg`` are (B, H, W) labels."""
        if not self.training:
            features = self._with_semantic(features)
            return self.forward_with_given_boxes(features, self._forward_box(features, proposals)), {}
        if targets is None:
            raise ValueError("HTCROIHeads in training mode needs the ground truth of every image")
        losses = {}
        if self.semantic_branch is not None:
            labels = getattr(images, "sem_seg", None)
            if labels is None:
                raise ValueError(
                    "MODEL.HTC.SEMANTIC_ON: True needs a model that hands on the label maps of its input: "
                    "MODEL.META_ARCHITECTURE: FrozenRCNN"
                )
            logits, semantic = self.semantic_branch(features)
            features = {**features, _SEMANTIC: semantic}
            losses["loss_sem_seg"] = self.semantic_branch.loss(logits, labels)
        proposals = self.label_and_sample_proposals(proposals, targets)
        return proposals, {**self._stage_losses(features, proposals, targets), **losses}

    def forward_with_given_boxes(self, features: Features, instances: list[Instances]) -> list[Instances]:
        """Add masks to detections (``pred_boxes``, ``pred_classes`` per image); inference only."""
        return super().forward_with_given_boxes(self._with_semantic(features), instances)

    def _stage_losses(
        self, features: Features, proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        sizes = [one.image_size for one in proposals]
        storage = get_event_storage()
        boxes: list[Tensor] = []
        for stage, weight in enumerate(self.stage_loss_weights):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, sizes)
                proposals = self._match_and_label_boxes(proposals, stage, targets)
            predictions = self._predict(features, proposals, stage)
            with storage.name_scope(f"stage{stage}"):
                found = self.box_predictor[stage].losses(predictions, proposals)
                with torch.no_grad():
                    boxes = self.box_predictor[stage].predict_boxes(predictions, proposals)
                if self.mask_on:
                    rois = self._create_proposals_from_boxes(boxes, sizes) if self.interleaved else proposals
                    found["loss_mask"] = self._mask_loss(features, rois, targets, stage)
            losses |= {f"{name}_stage{stage}": weight * loss for name, loss in found.items()}
        return losses

    def _forward_box(self, features: Features, proposals: list[Instances]) -> list[Instances]:
        """Inference: boxes of the last stage, mean scores of all of them."""
        sizes = [one.image_size for one in proposals]
        per_stage = []
        boxes: list[Tensor] = []
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, sizes)
            predictions = self._predict(features, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            per_stage.append(predictor.predict_probs(predictions, proposals))
        scores = [torch.stack(of_image).mean(dim=0) for of_image in zip(*per_stage)]
        last = self.box_predictor[-1]
        limits = (last.test_score_thresh, last.test_nms_thresh, last.test_topk_per_image)
        return fast_rcnn_inference(boxes, scores, sizes, *limits)[0]

    def _forward_mask(self, features: Features, instances: list[Instances]) -> list[Instances]:
        """Inference: ``pred_masks``, the mean over the stages."""
        if not self.mask_on:
            return instances
        x = self._pool_for_masks(features, [one.pred_boxes for one in instances])
        per_stage = []
        for head, mask_features in zip(self.mask_head, self._mask_features(x)):
            mask_rcnn_inference(head.logits(mask_features), instances)
            per_stage.append([one.pred_masks for one in instances])
        for one, *masks in zip(instances, *per_stage):
            one.pred_masks = torch.stack(masks).mean(dim=0)
        return instances

    def _predict(self, features: Features, proposals: list[Instances], stage: int) -> Any:
        boxes = [one.proposal_boxes for one in proposals]
        x = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        if _SEMANTIC in features:
            x = x + self.box_semantic_pooler([features[_SEMANTIC]], boxes)
        return self.box_predictor[stage](self.box_head[stage](x))

    def _pool_for_masks(self, features: Features, boxes: list[Boxes]) -> Tensor:
        x = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        if _SEMANTIC in features:
            x = x + self.mask_semantic_pooler([features[_SEMANTIC]], boxes)
        return x

    def _mask_features(self, x: Tensor) -> Iterator[Tensor]:
        """What the mask heads have before their deconvolution, stage by stage."""
        before = None
        for head in self.mask_head:
            now = head.features(x, before)
            yield now
            before = now if self.mask_info_flow else None

    def _mask_loss(
        self, features: Features, rois: list[Instances], targets: list[Instances], stage: int
    ) -> Tensor:
        objects = [
            self._objects(one.proposal_boxes, truth, one.image_size, stage)
            for one, truth in zip(rois, targets)
        ]
        x = self._pool_for_masks(features, [one.proposal_boxes for one in objects])
        head = self.mask_head[stage]
        if self.mask_info_flow:
            *_, last = (mask_features for _, mask_features in zip(range(stage + 1), self._mask_features(x)))
        else:
            last = head.features(x, None)
        return mask_rcnn_loss(head.logits(last), objects, self.vis_period)

    @torch.no_grad()
    def _objects(self, boxes: Boxes, truth: Instances, image_size: tuple[int, int], stage: int) -> Instances:
        """The boxes of one image that hold an object by the IoU of ``stage``, with its class and mask.

        At most as many as the sample of proposals may have: later stages find more, and memory must not grow.
        """
        match, label = self.proposal_matchers[stage](pairwise_iou(truth.gt_boxes, boxes))
        found = (label == 1).nonzero().squeeze(1)
        limit = int(self.batch_size_per_image * self.positive_fraction)
        if len(found) > limit:
            found = found[torch.randperm(len(found), device=found.device)[:limit]]
        objects = Instances(image_size)
        objects.proposal_boxes = boxes[found]
        if len(truth) > 0:
            objects.gt_classes = truth.gt_classes[match[found]]
            objects.gt_masks = truth.gt_masks[match[found]]
        return objects

    def _with_semantic(self, features: Features) -> Features:
        if self.semantic_branch is None or _SEMANTIC in features:
            return features
        return {**features, _SEMANTIC: self.semantic_branch(features)[1]}


class HTCMaskHead(MaskRCNNConvUpsampleHead):
    """Detectron2's mask head in two parts, with an input for the features of the stage before.

    Args:
        input_shape: of the pooled features, C channels.
        takes_flow: is there a stage before? Then ``flow`` is its 1x1 convolution G.
        kwargs: ``num_classes``, ``conv_dims`` and ``conv_norm`` of Detectron2's head.
    """

    def __init__(self, input_shape: ShapeSpec, *, takes_flow: bool, **kwargs: Any):
        super().__init__(input_shape, **kwargs)
        self.flow = None
        if takes_flow:
            dims, norm = kwargs["conv_dims"], kwargs.get("conv_norm", "")
            self.flow = Conv2d(
                dims[-2] if len(dims) > 1 else input_shape.channels,
                input_shape.channels,
                kernel_size=1,
                bias=not norm,
                norm=get_norm(norm, input_shape.channels),
                activation=nn.ReLU(),
            )
            c2_msra_fill(self.flow)

    def features(self, x: Tensor, before: Tensor | None) -> Tensor:
        """(M, C, h, w) RoI features, features of the stage before -> features of this stage, same h and w."""
        if before is not None:
            assert self.flow is not None, "the first mask head has no stage before it"
            x = x + self.flow(before)
        for conv in self.conv_norm_relus:
            x = conv(x)
        return x

    def logits(self, features: Tensor) -> Tensor:
        """Features of this stage -> (M, K or 1, 2h, 2w)."""
        return self.predictor(self.deconv_relu(self.deconv(features)))

    def layers(self, x: Tensor) -> Tensor:
        """(M, C, h, w) -> logits, without a stage before."""
        return self.logits(self.features(x, None))


def _semantic_pooler(part: CfgNode, stride: int) -> ROIPooler:
    return ROIPooler(part.POOLER_RESOLUTION, (1.0 / stride,), part.POOLER_SAMPLING_RATIO, part.POOLER_TYPE)
