"""What a backbone is made of: the base class of its blocks, and the depthwise separable convolution."""

from __future__ import annotations

from collections.abc import Callable

import fvcore.nn.weight_init as weight_init
from torch import Tensor, nn

from detectron2.layers.batch_norm import FrozenBatchNorm2d, get_norm
from detectron2.layers.wrappers import Conv2d

Norm = str | Callable[[int], nn.Module] | None
Activation = Callable[[Tensor], Tensor] | None


class CNNBlockBase(nn.Module):
    """A block with one input and one output map, of known channels and stride.

    Attributes:
        in_channels, out_channels: channels of the two maps.
        stride: input cells per output cell.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self) -> CNNBlockBase:
        """Take every parameter out of training, fix the batch norms, and return the block itself."""
        self.requires_grad_(False)
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self


class DepthwiseSeparableConv2d(nn.Module):
    """A convolution per channel, then a 1x1 convolution across channels (Xception, arXiv:1610.02357)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        padding: int = 1,
        dilation: int = 1,
        *,
        norm1: Norm = None,
        activation1: Activation = None,
        norm2: Norm = None,
        activation2: Activation = None,
    ) -> None:
        """
        Args:
            norm1, norm2: norm after the depthwise and the pointwise convolution; a convolution with norm has
                no bias.
            activation1, activation2: applied after that.
        """
        super().__init__()
        spatial = {"padding": padding, "dilation": dilation, "groups": in_channels}
        self.depthwise = _conv(in_channels, in_channels, kernel_size, norm1, activation1, **spatial)
        self.pointwise = _conv(in_channels, out_channels, 1, norm2, activation2)
        for conv in (self.depthwise, self.pointwise):
            weight_init.c2_msra_fill(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, norm: Norm, activation: Activation, **kwargs: int
) -> Conv2d:
    after = {"norm": get_norm(norm, out_channels), "activation": activation}
    return Conv2d(in_channels, out_channels, kernel_size, bias=not norm, **after, **kwargs)
