"""torch's layers under Detectron2's names, with the few things added that detectors need.

``Conv2d`` can carry its norm and activation; ``cross_entropy`` of nothing is 0 and not nan; the rest are
aliases and small helpers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BatchNorm2d = torch.nn.BatchNorm2d
ConvTranspose2d = torch.nn.ConvTranspose2d
Linear = torch.nn.Linear
interpolate = F.interpolate


class Conv2d(torch.nn.Conv2d):
    """A convolution, then optionally a norm, then optionally an activation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """
        Args:
            norm: module applied to the output, or None. Its parameters are named ``norm.*``.
            activation: callable applied last, or None.
            args, kwargs: everything else, as for torch.nn.Conv2d.
        """
        after = {name: kwargs.pop(name, None) for name in ("norm", "activation")}
        super().__init__(*args, **kwargs)
        self.norm, self.activation = after["norm"], after["activation"]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._refuse_empty_batch(x)
        x = self._conv_forward(x, self.weight, self.bias)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)

    def _refuse_empty_batch(self, x: Tensor) -> None:
        if self.training and x.numel() == 0 and isinstance(self.norm, torch.nn.SyncBatchNorm):
            # It would fail on the workers without input only, and the others would then wait for ever.
            raise AssertionError(
                "SyncBatchNorm cannot train on an empty batch; use naiveSyncBN_N or another norm"
            )


def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat of a list or tuple, but one tensor alone is returned itself, without a copy."""
    assert isinstance(tensors, (list, tuple)), "a list of tensors is needed"
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def empty_input_loss_func_wrapper(loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss whose mean over nothing is 0 instead of nan.

    Args:
        loss_func: called as ``loss_func(input, target, reduction=..., **kwargs)``.
    Returns:
        The same, except for an empty ``target`` with reduction "mean": then a 0 that still depends on
        ``input``, so that backward reaches every parameter (DistributedDataParallel waits for all of them).
    """

    @functools.wraps(loss_func)
    def guarded(input: Tensor, target: Tensor, *, reduction: str = "mean", **kwargs: Any) -> Tensor:
        if reduction == "mean" and target.numel() == 0:
            return 0.0 * input.sum()
        return loss_func(input, target, reduction=reduction, **kwargs)

    return guarded


cross_entropy = empty_input_loss_func_wrapper(F.cross_entropy)


def nonzero_tuple(x: Tensor):
    """Indices of the non-zero entries, one long tensor per dimension; a scalar counts as shape (1,).

    Returns:
        A tuple; in TorchScript, where tuples have a fixed length, a list.
    """
    if torch.jit.is_scripting():
        return torch.atleast_1d(x).nonzero().unbind(1)
    return torch.atleast_1d(x).nonzero(as_tuple=True)


def move_device_like(src: Tensor, dst: Tensor) -> Tensor:
    """``src`` on the device of ``dst``."""
    return src.to(dst.device)


def shapes_to_tensor(x: list[int] | list[Tensor], device: torch.device | None = None) -> Tensor:
    """Sizes as a 1-d tensor; sizes that are 0-d tensors already (under tracing) stay symbolic."""
    if len(x) > 0 and all(isinstance(side, Tensor) for side in x):
        stacked = torch.stack(list(x))
        return stacked if device is None else stacked.to(device=device)
    return torch.as_tensor(x, device=device)


def check_if_dynamo_compiling() -> bool:
    """Is this code being traced by torch.compile?"""
    return torch.compiler.is_compiling()


def disable_torch_compiler(func: Callable) -> Callable:
    """Decorator: torch.compile leaves this function alone."""
    return torch.compiler.disable(func)
