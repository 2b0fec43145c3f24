"""Baseline heads that label each pixel: one linear layer, or a light UPerNet.

They are called as Detectron2's SemSegFPNHead: ``head(features, targets)`` gives (None, losses) in training and
(logits, {}) otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY


class _PixelHead(nn.Module):
    """Cross entropy and upsampling around ``layers(features) -> (B, K, h, w)``."""

    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], num_classes: int, loss_weight: float, ignore_value: int
    ) -> None:
        super().__init__()
        if not input_shape:
            raise ValueError("MODEL.SEM_SEG_HEAD.IN_FEATURES names no maps.")
        self.in_features = sorted(input_shape, key=lambda name: input_shape[name].stride)
        self.stride = input_shape[self.in_features[0]].stride
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "num_classes": head.NUM_CLASSES,
            "norm": head.NORM,
            "loss_weight": head.LOSS_WEIGHT,
            "ignore_value": head.IGNORE_VALUE,
        }

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Maps by name -> (B, K, h, w) logits at the stride of the finest map."""
        raise NotImplementedError

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Args:
            features: (B, C, h, w) by name.
            targets: (B, H, W) int64 class ids, in training.
        Returns:
            (None, {"loss_sem_seg"}) in training; else logits (B, K, H, W) at the size of the input, and {}.
        """
        logits = self.layers(features)
        if self.training:
            assert targets is not None
            return None, {"loss_sem_seg": self.loss_weight * self.loss(logits, targets)}
        size = [side * self.stride for side in logits.shape[-2:]]
        return _resize(logits.float(), size), {}

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the pixels with a label; 0 if there are none."""
        full = _resize(logits.float(), targets.shape[-2:])
        total = F.cross_entropy(full, targets, ignore_index=self.ignore_value, reduction="sum")
        return total / (targets != self.ignore_value).sum().clamp(min=1)


@SEM_SEG_HEADS_REGISTRY.register()
class LinearSegHead(_PixelHead):
    """A norm and a 1x1 convolution on all maps, brought to the finest one's size and concatenated.

    A 1x1 convolution and bilinear upsampling may change places, and the convolution of concatenated maps is the sum of
    one per map: so it runs on the small maps, and only K channels are enlarged. The norm is that of each map.

    Args:
        input_shape: of the maps.
        num_classes: K.
        norm: as Detectron2's ``get_norm`` has it; "LN" suits any number of channels and any size.
        loss_weight: of the loss.
        ignore_value: label of pixels that do not count.
    Raises:
        ValueError: norm is "GN", which has 32 groups, and a map's channels do not divide by 32.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        norm: str = "LN",
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ) -> None:
        super().__init__(input_shape, num_classes, loss_weight, ignore_value)
        self.norms = nn.ModuleDict()
        self.predictors = nn.ModuleDict()
        total = sum(input_shape[name].channels for name in self.in_features)
        for i, name in enumerate(self.in_features):
            channels = input_shape[name].channels
            if norm == "GN" and channels % 32:
                raise ValueError(
                    f"MODEL.SEM_SEG_HEAD.NORM is GN, which needs multiples of 32 channels, and {name} has {channels}. "
                    "LinearSegHead normalises the backbone's own maps: set it to LN."
                )
            self.norms[name] = get_norm(norm, channels) or nn.Identity()
            conv = nn.Conv2d(channels, num_classes, 1, bias=i == 0)
            nn.init.normal_(conv.weight, std=total**-0.5)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            self.predictors[name] = conv

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        logits = [self.predictors[name](self.norms[name](features[name])) for name in self.in_features]
        size = logits[0].shape[-2:]
        return torch.stack([_resize(one, size) for one in logits]).sum(0)


@SEM_SEG_HEADS_REGISTRY.register()
class UPerNetHead(_PixelHead):
    """Pyramid pooling on the coarsest map, an FPN down to the finest, all levels fused (arXiv 1807.10221).

    Args:
        input_shape: of the maps.
        num_classes: K.
        conv_dims: width.
        pool_sizes: cells per side to which the coarsest map is averaged (arXiv 1612.01105).
        norm, loss_weight, ignore_value: as for :class:`LinearSegHead`.
    Raises:
        ValueError: norm is "GN", and the width is too small for its groups.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
        norm: str = "GN",
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ) -> None:
        super().__init__(input_shape, num_classes, loss_weight, ignore_value)
        if norm == "GN" and (conv_dims % 32 or conv_dims < 64):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.CONVS_DIM is {conv_dims}; with NORM GN, which has 32 groups, UPerNetHead wants a "
                "multiple of 32, and 64 or more: one cell of one channel cannot be normalised. LN takes any."
            )
        channels = [input_shape[name].channels for name in self.in_features]
        coarsest = channels[-1]
        self.pool_sizes = tuple(pool_sizes)
        self.pooled = nn.ModuleList(_conv(coarsest, conv_dims, 1, norm) for _ in pool_sizes)
        self.bottleneck = _conv(coarsest + conv_dims * len(self.pool_sizes), conv_dims, 3, norm)
        self.laterals = nn.ModuleList(_conv(c, conv_dims, 1, norm) for c in channels[:-1])
        self.outputs = nn.ModuleList(_conv(conv_dims, conv_dims, 3, norm) for _ in channels[:-1])
        self.fuse = _conv(conv_dims * len(channels), conv_dims, 3, norm)
        self.predictor = nn.Conv2d(conv_dims, num_classes, 1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        assert self.predictor.bias is not None
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return {**super().from_config(cfg, input_shape), "conv_dims": cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM}

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        *fine, coarse = (features[name] for name in self.in_features)
        pyramid = [self._pool(coarse)]  # coarse to fine
        for lateral, one in zip(reversed(self.laterals), reversed(fine)):
            pyramid.append(lateral(one) + _resize(pyramid[-1], one.shape[-2:]))
        size = pyramid[-1].shape[-2:]
        levels = [pyramid[0]]
        levels += [conv(one) for conv, one in zip(reversed(self.outputs), pyramid[1:])]
        return self.predictor(self.fuse(torch.cat([_resize(one, size) for one in levels], dim=1)))

    def _pool(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        regions = [
            _resize(conv(F.adaptive_avg_pool2d(x, cells)), size)
            for cells, conv in zip(self.pool_sizes, self.pooled)
        ]
        return self.bottleneck(torch.cat([x, *regions], dim=1))


def _conv(channels: int, out: int, kernel: int, norm: str) -> Conv2d:
    conv = Conv2d(
        channels,
        out,
        kernel_size=kernel,
        padding=kernel // 2,
        bias=not norm,
        norm=get_norm(norm, out),
        activation=F.relu,
    )
    c2_msra_fill(conv)
    return conv


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
