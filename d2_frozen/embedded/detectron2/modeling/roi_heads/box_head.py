"""What turns the pooled features of a box into one vector (or map) for the predictors?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry

from .._lookup import registered
from .._unfilled import unfilled_linear

__all__ = ["ROI_BOX_HEAD_REGISTRY", "FastRCNNConvFCHead", "build_box_head"]

ROI_BOX_HEAD_REGISTRY = Registry("ROI_BOX_HEAD")
ROI_BOX_HEAD_REGISTRY.__doc__ = """
Callables ``(cfg, input_shape: ShapeSpec) -> nn.Module`` by the name in ``MODEL.ROI_BOX_HEAD.NAME``.
The module maps (M, C, h, w) to features of its ``output_shape``.
"""


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCHead(nn.Sequential):
    """3x3 convolutions, then fully connected layers, a ReLU after each."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, conv_dims: Sequence[int], fc_dims: Sequence[int], conv_norm: str = ""
    ):
        """
        Args:
            input_shape: channels, height, width of the pooled features.
            conv_dims, fc_dims: widths of the layers; at least one in all.
            conv_norm: norm of the convolutions; they have a bias only without it.
        Raises:
            ValueError: no layer at all.
        """
        super().__init__()
        if not conv_dims and not fc_dims:
            raise ValueError(
                "FastRCNNConvFCHead without any layer: set MODEL.ROI_BOX_HEAD.NUM_CONV or NUM_FC above 0"
            )
        channels, height, width = input_shape.channels, input_shape.height, input_shape.width
        convs, fcs = [], []
        for i, dim in enumerate(conv_dims, start=1):
            conv = Conv2d(
                channels,
                dim,
                kernel_size=3,
                padding=1,
                bias=not conv_norm,
                norm=get_norm(conv_norm, dim),
                activation=nn.ReLU(inplace=True),
            )
            self.add_module(f"conv{i}", conv)
            convs.append(conv)
            channels = dim
        self._output_size: tuple[int, ...] | int = (channels, height, width)

        if fc_dims:
            self.add_module("flatten", nn.Flatten())
            features = channels * height * width
            for i, dim in enumerate(fc_dims, start=1):
                fc = unfilled_linear(features, dim)
                self.add_module(f"fc{i}", fc)
                self.add_module(f"fc_relu{i}", nn.ReLU(inplace=True))
                fcs.append(fc)
                features = dim
            self._output_size = features

        for conv in convs:
            c2_msra_fill(conv)
        for fc in fcs:
            c2_xavier_fill(fc)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        opts = cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "conv_dims": [opts.CONV_DIM] * opts.NUM_CONV,
            "fc_dims": [opts.FC_DIM] * opts.NUM_FC,
            "conv_norm": opts.NORM,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(M, C, h, w) -> (M, fc_dims[-1]), or (M, conv_dims[-1], h, w) without fully connected layers."""
        for layer in self:
            x = layer(x)
        return x

    @property
    @torch.jit.unused
    def output_shape(self) -> ShapeSpec:
        size = self._output_size
        if isinstance(size, int):
            return ShapeSpec(channels=size)
        return ShapeSpec(channels=size[0], height=size[1], width=size[2])


def build_box_head(cfg, input_shape: ShapeSpec) -> nn.Module:
    """Build ``MODEL.ROI_BOX_HEAD.NAME``."""
    return registered(ROI_BOX_HEAD_REGISTRY, cfg.MODEL.ROI_BOX_HEAD.NAME, "MODEL.ROI_BOX_HEAD.NAME")(
        cfg, input_shape
    )
