"""Feature Pyramid Network (Lin et al. 2017, arXiv:1612.03144).

In: images, which a bottom-up network turns into maps res2..res5.
Out: {"p2": stride 4, "p3": 8, "p4": 16, "p5": 32, ...}, all of the same width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_xavier_fill
from torch import nn

from detectron2.layers import Conv2d, ShapeSpec, get_norm

from .backbone import Backbone
from .build import BACKBONE_REGISTRY
from .resnet import build_resnet_backbone

__all__ = [
    "FPN",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
]


class FPN(Backbone):
    """Bottom-up network, lateral 1x1 and output 3x3 convolutions, and a top-down path."""

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        norm: str = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
        square_pad: int = 0,
    ):
        """
        Args:
            bottom_up: network whose maps are fused.
            in_features: names of its maps, fine to coarse; each stride must be twice the one before.
            out_channels: width of every output.
            norm: for the lateral and output convolutions; they have a bias only without it.
            top_block: makes ``num_levels`` coarser maps of the map ``in_feature`` (an output of FPN or of
                the bottom-up network).
            fuse_type: "sum" or "avg" of lateral and top-down map.
            square_pad: > 0 to have images padded to squares with this side, in pixels.
        Raises:
            ValueError: an unknown ``fuse_type``, no or unknown ``in_features``, strides that do not double.
        """
        super().__init__()
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"FPN fuses by 'sum' or 'avg', not {fuse_type!r} (MODEL.FPN.FUSE_TYPE)")
        shapes = bottom_up.output_shape()
        unknown = [name for name in in_features if name not in shapes]
        if unknown or not in_features:
            raise ValueError(
                f"FPN wants the maps {list(in_features)} (MODEL.FPN.IN_FEATURES), "
                f"the network below it has {list(shapes)}"
            )
        strides = [shapes[name].stride for name in in_features]
        if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:])):
            raise ValueError(
                f"strides of {list(in_features)} are {strides}; FPN needs each twice the one before"
            )

        # Fine to coarse when built (the order of seeded weights), coarse to fine when used.
        self.lateral_convs: list[Conv2d] = []
        self.output_convs: list[Conv2d] = []
        for name, stride in zip(in_features, strides):
            pair = []
            for kind, width, kernel in (("lateral", shapes[name].channels, 1), ("output", out_channels, 3)):
                conv = Conv2d(
                    width,
                    out_channels,
                    kernel,
                    padding=kernel // 2,
                    bias=norm == "",
                    norm=get_norm(norm, out_channels),
                )
                pair.append((f"fpn_{kind}{int(math.log2(stride))}", conv))
            for conv_name, conv in pair:
                c2_xavier_fill(conv)
                self.add_module(conv_name, conv)
            self.lateral_convs.insert(0, pair[0][1])
            self.output_convs.insert(0, pair[1][1])

        self.top_block = top_block
        self.in_features = tuple(in_features)
        self.bottom_up = bottom_up
        levels = [int(math.log2(stride)) for stride in strides]
        if top_block is not None:
            levels += [levels[-1] + 1 + i for i in range(top_block.num_levels)]
        self._out_features = [f"p{level}" for level in levels]
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._size_divisibility = strides[-1]
        self._square_pad = square_pad
        self._fuse_type = fuse_type

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self._square_pad}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) -> {"pN": (B, out_channels, H / 2**N, W / 2**N)}, fine to coarse."""
        below = self.bottom_up(x)
        maps: list[torch.Tensor] = []
        merged: torch.Tensor | None = None
        for name, lateral, output in zip(self.in_features[::-1], self.lateral_convs, self.output_convs):
            own = lateral(below[name])
            if merged is None:
                merged = own
            else:
                merged = own + F.interpolate(merged, scale_factor=2.0, mode="nearest")
                if self._fuse_type == "avg":
                    merged /= 2
            maps.append(output(merged))
        maps.reverse()
        if self.top_block is not None:
            source = self.top_block.in_feature
            top = below[source] if source in below else maps[self._out_features.index(source)]
            maps.extend(self.top_block(top))
        found: dict[str, torch.Tensor] = {}
        for i, name in enumerate(self._out_features):
            found[name] = maps[i]
        return found

    def __prepare_scriptable__(self) -> Backbone:
        return self._with_module_lists("lateral_convs", "output_convs")


class LastLevelMaxPool(nn.Module):
    """P6 of Faster R-CNN: every second cell of P5."""

    def __init__(self):
        super().__init__()
        self.num_levels = 1
        self.in_feature = "p5"

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [F.max_pool2d(x, kernel_size=1, stride=2, padding=0)]


class LastLevelP6P7(nn.Module):
    """P6 and P7 of RetinaNet (arXiv:1708.02002): strided 3x3 convolutions on C5, a ReLU between them."""

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "res5"):
        super().__init__()
        self.num_levels = 2
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            c2_xavier_fill(conv)

    def forward(self, c5: torch.Tensor) -> list[torch.Tensor]:
        p6 = self.p6(c5)
        return [p6, self.p7(F.relu(p6))]


def _fpn_on(bottom_up: Backbone, cfg, top_block: nn.Module) -> FPN:
    opts = cfg.MODEL.FPN
    return FPN(
        bottom_up,
        opts.IN_FEATURES,
        opts.OUT_CHANNELS,
        norm=opts.NORM,
        top_block=top_block,
        fuse_type=opts.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """ResNet with FPN as in Faster R-CNN: p2..p6."""
    return _fpn_on(build_resnet_backbone(cfg, input_shape), cfg, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """ResNet with FPN as in RetinaNet: p3..p7, the last two from res5."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    top_block = LastLevelP6P7(bottom_up.output_shape()["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return _fpn_on(bottom_up, cfg, top_block)
