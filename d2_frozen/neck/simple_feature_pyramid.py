"""Neck: the one map of a plain ViT -> feature pyramid.

In: {"plain": (B, C, H/s, W/s)}, s = 8, 16 or 32 pixels.
Out: {"p2".."p6"}: (B, C', H/t, W/t), t = 4..64 pixels; or maps "res2".."res5" for another neck.
Method: simple feature pyramid, ViTDet, arXiv:2203.16527, section 3: every level is made from the last map alone, by
strided deconvolution or pooling. All of it trains; the frozen part ends at the ViT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from fvcore.nn.weight_init import c2_xavier_fill
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from d2_frozen.backbone import PLAIN_FEATURE
from d2_frozen.neck.padding import PadsForBottomUp
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone

STRIDE_OF = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class PlainPyramid(Backbone):
    """A plain ViT and trained branches that make "res2".."res5" of its map, for FPN, ResidualFPN or BiFPN.

    Args:
        bottom_up: a backbone with the single feature "plain".
        out_features: of res2, res3, res4, res5.
    Raises:
        ValueError: no such feature.
    """

    def __init__(
        self, bottom_up: Backbone, out_features: Sequence[str] = ("res2", "res3", "res4", "res5")
    ) -> None:
        super().__init__()
        unknown = [name for name in out_features if name not in STRIDE_OF]
        if unknown or not out_features:
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES is {list(out_features)}; of a plain ViT there can be {', '.join(STRIDE_OF)}."
            )
        self.bottom_up = bottom_up
        source = bottom_up.output_shape()[PLAIN_FEATURE]
        branches = {name: _branch(source, STRIDE_OF[name]) for name in out_features}
        self.branches = nn.ModuleDict({name: branch for name, (branch, _) in branches.items()})
        self._out_features = list(out_features)
        self._out_feature_channels = {name: channels for name, (_, channels) in branches.items()}
        self._out_feature_strides = {name: STRIDE_OF[name] for name in out_features}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images, sides multiples of 32 -> maps by name, fine to coarse."""
        plain = self.bottom_up(images)[PLAIN_FEATURE]
        return {name: branch(plain) for name, branch in self.branches.items()}

    @property
    def size_divisibility(self) -> int:
        return math.lcm(max(self._out_feature_strides.values()), max(1, self.bottom_up.size_divisibility))

    @property
    def padding_constraints(self) -> dict[str, int]:
        return dict(self.bottom_up.padding_constraints)


class SimpleFeaturePyramid(PadsForBottomUp, Backbone):
    """ViTDet's neck: each branch, then a 1x1 and a 3x3 convolution with norm; the coarsest level is subsampled once.

    Args:
        bottom_up: a backbone with the single feature "plain".
        in_features: of res2..res5, which levels p2..p5 to make.
        out_channels: of every level.
        norm: of the two convolutions, by name in ``detectron2.layers.get_norm``; ViTDet has "LN".
    """

    def __init__(
        self, bottom_up: Backbone, in_features: Sequence[str], out_channels: int, *, norm: str = "LN"
    ) -> None:
        super().__init__()
        pyramid = PlainPyramid(bottom_up, in_features)
        shapes = pyramid.output_shape()
        self.bottom_up = bottom_up
        self.in_features = [PLAIN_FEATURE]
        self.branches = pyramid.branches
        self.outputs = nn.ModuleDict(
            {name: _output(shapes[name].channels, out_channels, norm) for name in in_features}
        )
        strides = [shapes[name].stride for name in in_features]
        strides.append(2 * strides[-1])
        self._coarsest_stride = strides[-2]
        self._out_features = [f"p{int(math.log2(stride))}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised and padded images -> maps by name, fine to coarse."""
        plain = self.bottom_up(images)[PLAIN_FEATURE]
        levels = [self.outputs[name](branch(plain)) for name, branch in self.branches.items()]
        levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return dict(zip(self._out_features, levels))

    @property
    def size_divisibility(self) -> int:
        return math.lcm(self._coarsest_stride, super().size_divisibility)


def _branch(source: ShapeSpec, stride: int) -> tuple[nn.Sequential, int]:
    """Layers from the source's stride to another, and their output channels; channels halve as sides double."""
    channels, layers = source.channels, []
    steps = int(math.log2(source.stride / stride))
    for step in range(steps):
        if step:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels //= 2
    layers += [nn.MaxPool2d(kernel_size=2, stride=2) for _ in range(-steps)]
    return nn.Sequential(*layers), channels


def _output(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, size in ((in_channels, 1), (out_channels, 3)):
        conv = nn.Conv2d(channels, out_channels, size, padding=size // 2, bias=not norm)
        c2_xavier_fill(conv)
        layers += [conv, get_norm(norm, out_channels) or nn.Identity()]
    return nn.Sequential(*layers)
