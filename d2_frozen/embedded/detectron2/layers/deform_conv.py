"""Convolutions that sample at learned offsets (arXiv:1703.06211), optionally weighted (arXiv:1811.11168).

Both run on torchvision's operator. Offsets hold (y, x) per deformable group and kernel cell, in cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d

Pair = int | tuple[int, int]
Activation = Callable[[Tensor], Tensor] | None


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
    """The same with samples multiplied by ``mask`` (B, deformable_groups * kh * kw, h, w)."""
    _check_groups(input, offset, weight, groups, deformable_groups)
    return deform_conv2d(input, offset, weight, bias, _pair(stride), _pair(padding), _pair(dilation), mask)


class _DeformableBase(nn.Module):
    """What both versions share: the weights and how they start, the norm and the activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        deformable_groups: int,
        bias: bool,
        norm: nn.Module | None,
        activation: Activation,
    ) -> None:
        super().__init__()
        for name, channels in (("input", in_channels), ("output", out_channels)):
            assert channels % groups == 0, f"{channels} {name} channels do not divide into {groups} groups"
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.deformable_groups = groups, deformable_groups
        self.with_bias = bias
        self.norm = norm
        self.activation = activation

        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def _geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups", "deformable_groups")
        return {name: getattr(self, name) for name in names}

    def _finish(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def extra_repr(self) -> str:
        shown = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            **self._geometry(),
            "bias": self.with_bias,
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items())


class DeformConv(_DeformableBase):
    """Deformable convolution without bias. Arguments as for Conv2d; ``bias`` is there to be refused.

    ``deformable_groups`` parts of the input channels have offsets of their own.
    """

    # fmt: off
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0,
        dilation: Pair = 1, groups: int = 1, deformable_groups: int = 1, bias: bool = False,
        norm: nn.Module | None = None, activation: Activation = None,
    ) -> None:
        # fmt: on
        assert not bias, "DeformConv has no bias; use ModulatedDeformConv, or a norm with one"
        geometry = (kernel_size, _pair(stride), _pair(padding), _pair(dilation), groups, deformable_groups)
        super().__init__(in_channels, out_channels, *geometry, False, norm, activation)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return self._finish(deform_conv(x, offset, self.weight, **self._geometry()))


class ModulatedDeformConv(_DeformableBase):
    """Deformable convolution whose samples are weighted; it has a bias unless told otherwise."""

    # fmt: off
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0,
        dilation: Pair = 1, groups: int = 1, deformable_groups: int = 1, bias: bool = True,
        norm: nn.Module | None = None, activation: Activation = None,
    ) -> None:
        # fmt: on
        geometry = (kernel_size, stride, padding, dilation, groups, deformable_groups)
        super().__init__(in_channels, out_channels, *geometry, bias, norm, activation)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        out = modulated_deform_conv(x, offset, mask, self.weight, self.bias, **self._geometry())
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
