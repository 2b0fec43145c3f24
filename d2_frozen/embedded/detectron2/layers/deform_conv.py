"""Convolutions that sample at learned offsets (arXiv:1703.06211), optionally weighted by a learned mask (v2, 1811.11168).

Both run on torchvision's operator. Offsets hold (y, x) per deformable group and kernel cell, in feature cells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d

Pair = int | tuple[int, int]


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deformable_groups: int = 1,
    im2col_step: int = 64,
) -> Tensor:
    """Deformable convolution.

    Args:
        input: (B, C, H, W).
        offset: (B, 2 * deformable_groups * kh * kw, h, w) for an output of h x w.
        weight: (C_out, C / groups, kh, kw).
        groups, deformable_groups: read from the shapes; they must agree with them.
        im2col_step: has no effect, the operator chooses by itself.
    """
    _check_groups(input, offset, weight, groups, deformable_groups)
    return deform_conv2d(input, offset, weight, None, _pair(stride), _pair(padding), _pair(dilation))


def modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deformable_groups: int = 1,
) -> Tensor:
    """Deformable convolution whose samples are multiplied by ``mask`` (B, deformable_groups * kh * kw, h, w)."""
    _check_groups(input, offset, weight, groups, deformable_groups)
    return deform_conv2d(input, offset, weight, bias, _pair(stride), _pair(padding), _pair(dilation), mask)


class _DeformableBase(nn.Module):
    """What both versions share: the weights and how they start, the norm and the activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Arguments as for Conv2d; ``deformable_groups`` parts of the channels have offsets of their own."""
        super().__init__()
        assert in_channels % groups == 0, f"{in_channels} input channels do not divide into {groups} groups"
        assert out_channels % groups == 0, f"{out_channels} output channels do not divide into {groups} groups"
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.with_bias = bias
        self.norm = norm
        self.activation = activation

        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def _finish(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def extra_repr(self) -> str:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        shown = [f"{name}={getattr(self, name)}" for name in (*names, "deformable_groups")]
        return ", ".join([*shown, f"bias={self.with_bias}"])


class DeformConv(_DeformableBase):
    """Deformable convolution without bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        assert not bias, "DeformConv has no bias; use ModulatedDeformConv, or a norm with one"
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deformable_groups,
            norm=norm,
            activation=activation,
        )

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        out = deform_conv(
            x,
            offset,
            self.weight,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deformable_groups,
        )
        return self._finish(out)


class ModulatedDeformConv(_DeformableBase):
    """Deformable convolution whose samples are weighted; it has a bias unless told otherwise."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deformable_groups,
            bias,
            norm,
            activation,
        )

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        out = modulated_deform_conv(
            x,
            offset,
            mask,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deformable_groups,
        )
        return self._finish(out)


def _check_groups(input: Tensor, offset: Tensor, weight: Tensor, groups: int, deformable_groups: int) -> None:
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"{input.shape[1]} input channels do not fit {groups} groups of {weight.shape[1]} channels each"
        )
    wanted = 2 * deformable_groups * weight.shape[2] * weight.shape[3]
    if offset.shape[1] != wanted:
        raise ValueError(
            f"offset has {offset.shape[1]} channels; {deformable_groups} deformable groups of a "
            f"{weight.shape[2]}x{weight.shape[3]} kernel need {wanted}"
        )
