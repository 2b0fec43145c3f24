"""Which pixels of a box belong to its object? Mask heads (Mask R-CNN, arXiv:1703.06870), loss, inference.

A head predicts (M, K, side, side) logits on a grid over each of M boxes; K is 1 for class-agnostic masks.
"""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, cat, get_norm
from detectron2.layers._box_maps_cpu import BlockDeconvolution, CellPredictor, laid_out
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage, get_event_storage
from detectron2.utils.registry import Registry

from .._lookup import registered

__all__ = [
    "BaseMaskRCNNHead",
    "MaskRCNNConvUpsampleHead",
    "ROI_MASK_HEAD_REGISTRY",
    "build_mask_head",
    "mask_rcnn_inference",
    "mask_rcnn_loss",
]

ROI_MASK_HEAD_REGISTRY = Registry("ROI_MASK_HEAD")
ROI_MASK_HEAD_REGISTRY.__doc__ = """
Callables ``(cfg, input_shape: ShapeSpec) -> nn.Module`` by the name in ``MODEL.ROI_MASK_HEAD.NAME``.
The module is called with (features, instances); see :class:`BaseMaskRCNNHead`.
"""


def mask_rcnn_loss(
    pred_mask_logits: torch.Tensor, instances: list[Instances], vis_period: int = 0
) -> torch.Tensor:
    """Mean binary cross entropy of the logits of the true class against the true mask, cut out by the box.

    Also logs mask_rcnn/accuracy, /false_positive and /false_negative (fractions of cells).

    Args:
        pred_mask_logits: (M, K or 1, side, side), in the order of ``instances``.
        instances: per image, with ``proposal_boxes``, ``gt_classes``, ``gt_masks``; no background.
        vis_period: > 0 to put pictures into the EventStorage every so many iterations.
    Returns:
        a scalar; 0 with a gradient of 0 if there is no object.
    """
    side = pred_mask_logits.shape[2]
    if pred_mask_logits.shape[3] != side:
        raise ValueError(f"mask heads predict squares, got shape {tuple(pred_mask_logits.shape)}")
    with_objects = [one for one in instances if len(one) > 0]
    if not with_objects:
        return pred_mask_logits.sum() * 0

    device = pred_mask_logits.device
    truth = cat(
        [one.gt_masks.crop_and_resize(one.proposal_boxes.tensor, side).to(device) for one in with_objects],
        dim=0,
    )  # (M, side, side)
    if pred_mask_logits.shape[1] == 1:
        logits = pred_mask_logits[:, 0]
    else:
        classes = cat([one.gt_classes.to(dtype=torch.int64) for one in with_objects], dim=0)
        logits = pred_mask_logits[torch.arange(len(classes), device=device), classes]

    inside = truth if truth.dtype == torch.bool else truth > 0.5
    truth = truth.to(dtype=torch.float32)
    storage = get_event_storage()
    _log_mask_stats(storage, logits.detach(), inside)
    if vis_period > 0 and storage.iter % vis_period == 0:
        side_by_side = torch.cat([logits.detach().sigmoid(), truth], dim=2)  # (M, side, 2 * side)
        for i, picture in enumerate(side_by_side):
            name = f"Left: mask prediction;   Right: mask GT ({i})"
            storage.put_image(name, picture.expand(3, -1, -1))
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="mean")


def _log_mask_stats(storage: EventStorage, logits: torch.Tensor, inside: torch.Tensor) -> None:
    wrong = (logits > 0.0) != inside
    # One transfer to the host for all three counts.
    num_inside, num_missed, num_wrong = torch.stack(
        [inside.sum(), (wrong & inside).sum(), wrong.sum()]
    ).tolist()
    total = inside.numel()
    storage.put_scalar("mask_rcnn/accuracy", 1 - num_wrong / max(total, 1.0))
    storage.put_scalar("mask_rcnn/false_positive", (num_wrong - num_missed) / max(total - num_inside, 1.0))
    storage.put_scalar("mask_rcnn/false_negative", num_missed / max(num_inside, 1.0))


def mask_rcnn_inference(pred_mask_logits: torch.Tensor, pred_instances: list[Instances]) -> None:
    """Give every instance the mask of its predicted class as ``pred_masks``, in place.

    Args:
        pred_mask_logits: (M, K or 1, side, side), in the order of ``pred_instances``.
        pred_instances: per image, with ``pred_classes``; they get ``pred_masks`` (R, 1, side, side),
            probabilities on a grid over the box.
    """
    if pred_mask_logits.shape[1] == 1:
        probabilities = pred_mask_logits.sigmoid()
    else:
        classes = cat([one.pred_classes for one in pred_instances])
        rows = torch.arange(len(classes), device=classes.device)
        probabilities = pred_mask_logits[rows, classes].unsqueeze(1).sigmoid()
    sizes = [len(one) for one in pred_instances]
    for one, masks in zip(pred_instances, probabilities.split(sizes, dim=0)):
        one.pred_masks = masks


# At inference; a part of 32 boxes has maps of some megabytes.
_CPU_BOXES_AT_ONCE = 32


class BaseMaskRCNNHead(nn.Module, metaclass=ABCMeta):
    """Loss and inference around :meth:`layers`, which a subclass defines."""

    @configurable
    def __init__(self, *, loss_weight: float = 1.0, vis_period: int = 0):
        super().__init__()
        self.vis_period = vis_period
        self.loss_weight = loss_weight

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        return {"vis_period": cfg.VIS_PERIOD}

    def forward(self, x: torch.Tensor, instances: list[Instances]) -> Any:
        """
        Args:
            x: (M, C, h, w) features of the boxes of ``instances``.
            instances: per image; labelled proposals in training, detections at inference.
        Returns:
            {"loss_mask": scalar} in training; at inference ``instances``, now with ``pred_masks``.
        """
        if self.training:
            loss = mask_rcnn_loss(self.layers(x), instances, self.vis_period)
            return {"loss_mask": loss * self.loss_weight}
        mask_rcnn_inference(self._logits_in_parts(x), instances)
        return instances

    def _logits_in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """As :meth:`layers`. On CPU some boxes at a time: their maps stay in the cache, and memory is saved."""
        if x.device.type != "cpu" or torch.jit.is_scripting() or torch.jit.is_tracing() or len(x) == 0:
            return self.layers(x)
        return cat([self.layers(part) for part in x.split(_CPU_BOXES_AT_ONCE)])

    @abstractmethod
    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """(M, C, h, w) -> (M, K or 1, side, side) logits."""


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNConvUpsampleHead(BaseMaskRCNNHead, nn.Sequential):
    """3x3 convolutions, a 2x2 deconvolution that doubles the size, and a 1x1 predictor."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: str = "",
        **kwargs: Any,
    ):
        """
        Args:
            input_shape: of the pooled features.
            num_classes: K, or 1 for class-agnostic masks.
            conv_dims: widths; the last one is that of the deconvolution.
            conv_norm: norm of the convolutions; they have a bias only without it.
            kwargs: for :class:`BaseMaskRCNNHead`.
        Raises:
            ValueError: ``conv_dims`` is empty.
        """
        super().__init__(**kwargs)
        if not conv_dims:
            raise ValueError("MaskRCNNConvUpsampleHead needs conv_dims, at least the deconvolution's width")
        *widths, last = conv_dims
        channels = input_shape.channels
        self.conv_norm_relus: list[Conv2d] = []
        for i, dim in enumerate(widths, start=1):
            conv = Conv2d(
                channels,
                dim,
                kernel_size=3,
                padding=1,
                bias=not conv_norm,
                norm=get_norm(conv_norm, dim),
                activation=nn.ReLU(inplace=True),
            )
            self.add_module(f"mask_fcn{i}", conv)
            self.conv_norm_relus.append(conv)
            channels = dim
        self.deconv = BlockDeconvolution(channels, last, kernel_size=2, stride=2)
        self.add_module("deconv_relu", nn.ReLU(inplace=True))
        self.predictor = CellPredictor(last, num_classes, kernel_size=1)

        for conv in (*self.conv_norm_relus, self.deconv):
            c2_msra_fill(conv)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        opts = cfg.MODEL.ROI_MASK_HEAD
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "num_classes": 1 if opts.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dims": [opts.CONV_DIM] * (opts.NUM_CONV + 1),
            "conv_norm": opts.NORM,
        }

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Sequential.forward(self, laid_out(x))


def build_mask_head(cfg, input_shape: ShapeSpec) -> nn.Module:
    """Build ``MODEL.ROI_MASK_HEAD.NAME``."""
    name = cfg.MODEL.ROI_MASK_HEAD.NAME
    return registered(ROI_MASK_HEAD_REGISTRY, name, "MODEL.ROI_MASK_HEAD.NAME")(cfg, input_shape)
