"""A class for every pixel: the model around a segmentation head, and Panoptic FPN's head (arXiv:1901.02446).

In: a list of dicts, one per image: "image" (C, H, W) in 0..255, in training "sem_seg" (H, W) class ids,
optionally "height" and "width" of the wanted output.
Out: losses, or per image {"sem_seg": (K, height, width)}.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.structures import ImageList
from detectron2.utils.registry import Registry

from .._lookup import registered
from ..backbone import Backbone, build_backbone
from ..postprocessing import sem_seg_postprocess
from .build import META_ARCH_REGISTRY
from .rcnn import Batch, _pixel_statistics, _PixelModel

__all__ = ["SEM_SEG_HEADS_REGISTRY", "SemSegFPNHead", "SemanticSegmentor", "build_sem_seg_head"]

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
SEM_SEG_HEADS_REGISTRY.__doc__ = """
Callables ``(cfg, input_shape: dict[str, ShapeSpec]) -> nn.Module``, named in ``MODEL.SEM_SEG_HEAD.NAME``.
The module is called with (features, targets) and returns (logits or None, losses), as :class:`SemSegFPNHead`.
"""


def build_sem_seg_head(cfg, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build ``MODEL.SEM_SEG_HEAD.NAME``."""
    name = cfg.MODEL.SEM_SEG_HEAD.NAME
    return registered(SEM_SEG_HEADS_REGISTRY, name, "MODEL.SEM_SEG_HEAD.NAME")(cfg, input_shape)


@META_ARCH_REGISTRY.register()
class SemanticSegmentor(_PixelModel):
    """A backbone and a head that labels pixels."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ):
        """
        Args:
            backbone: images -> maps by name.
            sem_seg_head: (maps, targets or None) -> (logits (B, K, H, W) or None, losses).
            pixel_mean, pixel_std: per channel, in 0..255.
        """
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self._set_pixel_statistics(pixel_mean, pixel_std)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            **_pixel_statistics(cfg),
        }

    def forward(self, batched_inputs: Batch) -> dict[str, torch.Tensor] | Batch:
        """Losses in training mode, else logits of every image at the wanted output size."""
        images = self.preprocess_image(batched_inputs)
        targets = None
        if "sem_seg" in batched_inputs[0]:
            # Padded as the images are, with the label that the loss leaves out.
            targets = ImageList.from_tensors(
                [one["sem_seg"].to(self.device) for one in batched_inputs],
                self.backbone.size_divisibility,
                self.sem_seg_head.ignore_value,
                self.backbone.padding_constraints,
            ).tensor
        logits, losses = self.sem_seg_head(self.backbone(images.tensor), targets)
        if self.training:
            return losses
        results = []
        for scores, one, size in zip(logits, batched_inputs, images.image_sizes):
            height, width = one.get("height", size[0]), one.get("width", size[1])
            results.append({"sem_seg": sem_seg_postprocess(scores, size, height, width)})
        return results


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegFPNHead(nn.Module):
    """Every map is brought to one stride by convolutions and bilinear upsampling; the sum is classified."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        common_stride: int,
        loss_weight: float = 1.0,
        norm: str | Callable[[int], nn.Module] | None = None,
        ignore_value: int = -1,
    ):
        """
        Args:
            input_shape: of the maps to use.
            num_classes: K.
            conv_dims: width of all convolutions.
            common_stride: of the sum; no map may have a finer one.
            loss_weight: of loss_sem_seg.
            norm: after each convolution; they have a bias only without it.
            ignore_value: label of pixels that do not count.
        Raises:
            ValueError: no input maps.
        """
        super().__init__()
        if not input_shape:
            raise ValueError("SemSegFPNHead needs input maps, MODEL.SEM_SEG_HEAD.IN_FEATURES names none")
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in by_stride]
        self.common_stride = common_stride
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value

        self.scale_heads: list[nn.Sequential] = []
        for name, shape in by_stride:
            doublings = int(math.log2(shape.stride) - math.log2(common_stride))
            ops: list[nn.Module] = []
            for i in range(max(1, doublings)):
                conv = Conv2d(
                    shape.channels if i == 0 else conv_dims,
                    conv_dims,
                    kernel_size=3,
                    padding=1,
                    bias=not norm,
                    norm=get_norm(norm, conv_dims),
                    activation=F.relu,
                )
                c2_msra_fill(conv)
                ops.append(conv)
                if shape.stride != common_stride:
                    ops.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            head = nn.Sequential(*ops)
            self.add_module(name, head)
            self.scale_heads.append(head)
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        opts = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {name: shape for name, shape in input_shape.items() if name in opts.IN_FEATURES},
            "num_classes": opts.NUM_CLASSES,
            "conv_dims": opts.CONVS_DIM,
            "common_stride": opts.COMMON_STRIDE,
            "loss_weight": opts.LOSS_WEIGHT,
            "norm": opts.NORM,
            "ignore_value": opts.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """
        Args:
            features: maps by name.
            targets: (B, H, W) class ids; in training only.
        Returns:
            (None, losses) in training; at inference (B, K, H, W) logits at the size of the input, and {}.
        """
        logits = self.layers(features)
        if self.training:
            return None, self.losses(logits, targets)
        return self._enlarge(logits), {}

    def layers(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, K, H / common_stride, W / common_stride) logits."""
        total = None
        for name, head in zip(self.in_features, self.scale_heads):
            x = head(features[name])
            total = x if total is None else total + x
        return self.predictor(total)

    def losses(self, predictions: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean cross entropy over the pixels with a label."""
        # In float32 whatever the autocast: bilinear sums of many half-precision logits lose the small ones.
        logits = self._enlarge(predictions.float())
        loss = F.cross_entropy(logits, targets, reduction="mean", ignore_index=self.ignore_value)
        return {"loss_sem_seg": loss * self.loss_weight}

    def _enlarge(self, logits: torch.Tensor) -> torch.Tensor:
        return F.interpolate(logits, scale_factor=self.common_stride, mode="bilinear", align_corners=False)
