"""Atrous spatial pyramid pooling: a map at several dilations and as a whole (DeepLabV3, arXiv:1706.05587)."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.layers.batch_norm import get_norm
from detectron2.layers.blocks import DepthwiseSeparableConv2d
from detectron2.layers.wrappers import Conv2d


class ASPP(nn.Module):
    """Five branches (1x1, three dilated 3x3, pooled), joined by a 1x1 convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilations: list[int],
        *,
        norm: str | Callable[[int], nn.Module],
        activation: Callable[[Tensor], Tensor],
        pool_kernel_size: tuple[int, int] | None = None,
        dropout: float = 0.0,
        use_depthwise_separable_conv: bool = False,
    ) -> None:
        """
        Args:
            in_channels: of the input.
            out_channels: of each branch and of the result.
            dilations: of the three 3x3 branches.
            norm: see ``get_norm``; the pooled branch has a bias instead.
            activation: after every convolution.
            pool_kernel_size: (h, w) of the average in the pooled branch; None takes the whole map.
            dropout: probability at the end.
            use_depthwise_separable_conv: for the 3x3 branches.
        """
        super().__init__()
        assert len(dilations) == 3, f"ASPP has 3 dilated branches, got {len(dilations)} dilations"
        self.pool_kernel_size = pool_kernel_size
        self.dropout = dropout

        def plain_conv(channels: int, kernel_size: int, dilation: int = 1) -> Conv2d:
            conv = Conv2d(
                channels,
                out_channels,
                kernel_size,
                padding=dilation * (kernel_size // 2),
                dilation=dilation,
                bias=norm == "",
                norm=get_norm(norm, out_channels),
                activation=deepcopy(activation),
            )
            weight_init.c2_xavier_fill(conv)
            return conv

        def norms_and_activations() -> dict:
            own = {f"activation{i}": deepcopy(activation) for i in (1, 2)}
            return {**own, "norm1": norm, "norm2": norm}

        def dilated_conv(dilation: int) -> nn.Module:
            if not use_depthwise_separable_conv:
                return plain_conv(in_channels, 3, dilation)
            return DepthwiseSeparableConv2d(
                in_channels, out_channels, 3, dilation, dilation, **norms_and_activations()
            )

        pool = (
            nn.AdaptiveAvgPool2d(1) if pool_kernel_size is None else nn.AvgPool2d(pool_kernel_size, stride=1)
        )
        self.convs = nn.ModuleList([plain_conv(in_channels, 1), *map(dilated_conv, dilations)])
        self.convs.append(
            nn.Sequential(pool, Conv2d(in_channels, out_channels, 1, activation=deepcopy(activation)))
        )
        weight_init.c2_xavier_fill(self.convs[-1][1])
        self.project = plain_conv(5 * out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W).

        Raises:
            ValueError: the map is no multiple of ``pool_kernel_size``.
        """
        size = x.shape[-2:]
        kernel = self.pool_kernel_size
        if kernel is not None and (size[0] % kernel[0] or size[1] % kernel[1]):
            raise ValueError(
                f"ASPP: a map of {tuple(size)} is no multiple of pool_kernel_size {tuple(kernel)}"
            )
        branches = [branch(x) for branch in self.convs]
        branches[-1] = F.interpolate(branches[-1], size=size, mode="bilinear", align_corners=False)
        joined = self.project(torch.cat(branches, dim=1))
        return F.dropout(joined, self.dropout, training=self.training) if self.dropout > 0 else joined
