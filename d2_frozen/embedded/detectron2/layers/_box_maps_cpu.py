"""Layers of a mask head on a CPU: maps of single boxes with channels last; a deconvolution and a 1x1 convolution as the
matrix products that they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wrappers import Conv2d


def laid_out(x: Tensor) -> Tensor:
    """(M, C, h, w) -> the same numbers; on a CPU with channels last, as convolutions and their products want them."""
    if torch.jit.is_scripting() or torch.jit.is_tracing() or x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last)


class CellPredictor(Conv2d):
    """A 1x1 convolution. torch's turns the gradient back to channels first, and what follows is then slow."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.jit.is_scripting() and (
            self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and _has_channels_last(input)
        ):
            return F.linear(input.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class BlockDeconvolution(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` of equal kernel and stride: every cell becomes a block of its own, so it is one product.

    torch's deconvolution takes half as long again on a CPU, and in bfloat16 ten times as long.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not torch.jit.is_scripting() and output_size is None and self._is_one_product(input):
            return self._as_product(input)
        return super().forward(input, output_size)

    def _is_one_product(self, x: Tensor) -> bool:
        blocks = self.kernel_size == self.stride and self.padding == self.output_padding == (0, 0)
        return blocks and self.dilation == (1, 1) and self.groups == 1 and _has_channels_last(x)

    def _as_product(self, x: Tensor) -> Tensor:
        kh, kw = self.kernel_size
        # Rows of the matrix: place in the block, then channel.
        matrix = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        bias = None if self.bias is None else self.bias.repeat(kh * kw)
        return _BlocksToMap.apply(F.linear(x.permute(0, 2, 3, 1), matrix, bias), kh, kw)


class _BlocksToMap(torch.autograd.Function):
    """(B, h, w, kh * kw * C) -> (B, C, h * kh, w * kw), channels last.

    A tensor of its own and not a view of one: behind a view, an activation in place costs copies of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, kh: int, kw: int) -> Tensor:
        batch, h, w, _ = blocks.shape
        blocks = blocks.view(batch, h, w, kh, kw, -1)
        ctx.shape = blocks.shape
        pixels = torch.empty(
            (batch, blocks.shape[-1], h * kh, w * kw),
            dtype=blocks.dtype,
            memory_format=torch.channels_last,
        )
        _blocks_of(pixels, ctx.shape).copy_(blocks)
        return pixels

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous(memory_format=torch.channels_last)
        return _blocks_of(grad, ctx.shape).flatten(3), None, None


def _blocks_of(pixels: Tensor, shape: torch.Size) -> Tensor:
    """A view of a map with channels last, of ``shape`` (B, h, w, kh, kw, C)."""
    batch, h, w, kh, kw, channels = shape
    return pixels.permute(0, 2, 3, 1).view(batch, h, kh, w, kw, channels).transpose(2, 3)


def _has_channels_last(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.numel() == 0 or torch.jit.is_tracing():
        return False
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
