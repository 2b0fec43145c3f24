"""A convolution whose gradient comes from few cells of its output, as in an RPN that samples its anchors.

Of the tens of thousands of cells of a pyramid some hundred have an anchor in the loss; at all others the gradient is 0,
and so is all that backward multiplies with it. On a CPU the rest is computed alone: sums are the same, without their
zeros. On a GPU finding the cells would stop the stream, for products that take it no time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Above this share of all cells, products over whole maps are faster than gathering.
_FEW = 1 / 8


class ConvOfFewGradients(nn.Conv2d):
    """``nn.Conv2d`` of stride 1 for such a place. Gradients that are not few are computed as ever."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.jit.is_scripting() and self._applies(input):
            if torch.is_autocast_enabled("cpu"):
                # A Function of its own sees none of autocast's casts.
                dtype = torch.get_autocast_dtype("cpu")
                input, weight = input.to(dtype), weight.to(dtype)
                bias = None if bias is None else bias.to(dtype)
            return _Convolution.apply(input, weight, bias, self.padding)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _applies(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or not torch.is_grad_enabled() or x.dim() != 4 or x.numel() == 0:
            return False
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return False
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        return plain and isinstance(self.padding, tuple)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.has_bias = padding, bias is not None
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        cells = (grad != 0).any(dim=1).nonzero()  # (n, 3): image, row, column
        if len(cells) > _FEW * grad[:, 0].numel():
            return *_over_all_cells(grad, x, weight, ctx.padding, wanted), None
        image, row, column = cells.unbind(1)
        of_cells = grad[image, :, row, column]  # (n, out)
        of_x, of_weight = _over_cells(of_cells, cells, x, weight, ctx.padding, wanted)
        return of_x, of_weight, of_cells.sum(dim=0) if wanted[2] else None, None


def _over_cells(
    grad: Tensor, cells: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and weight, from the gradient (n, out) of some cells (n, 3) of the output."""
    batch, channels, height, width = x.shape
    image, row, column = cells.unbind(1)
    of_x = x.new_zeros(batch * height * width, channels) if wanted[0] else None
    of_weight = torch.zeros_like(weight) if wanted[1] else None
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            y_read, x_read = row + (i - padding[0]), column + (j - padding[1])
            inside = ((y_read >= 0) & (y_read < height) & (x_read >= 0) & (x_read < width)).nonzero()[:, 0]
            of_image, y_read, x_read = image[inside], y_read[inside], x_read[inside]
            if of_x is not None:
                place = (of_image * height + y_read) * width + x_read
                of_x.index_add_(0, place, grad[inside] @ weight[:, :, i, j])
            if of_weight is not None:
                of_weight[:, :, i, j] = grad[inside].T @ x[of_image, :, y_read, x_read]
    if of_x is None:
        return None, of_weight
    of_x = of_x.view(batch, height, width, channels).permute(0, 3, 1, 2)
    last = x.is_contiguous(memory_format=torch.channels_last)
    return of_x if last else of_x.contiguous(), of_weight


def _over_all_cells(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    bias_sizes = [len(weight)] if wanted[2] else None
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_sizes, [1, 1], list(padding), [1, 1], False, [0, 0], 1, wanted
    )
