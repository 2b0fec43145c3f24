"""Copies of modules that share their tensors, so that a change of one copy's structure costs no memory."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def with_shared_tensors(module: Module) -> Module:
    """A copy that may be rearranged; its parameters and buffers are those of ``module``, in eval mode."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo).eval()


def convert_tensors(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace each tensor of the module by one in ``dtype`` on ``device``; others that share it keep theirs.

    nn.Module's own ``to`` would change the shared parameters themselves. What a module names in ``in_float32`` keeps
    its precision.
    """
    done: dict[int, Tensor] = {}

    def converted(tensor: Tensor, exact: bool) -> Tensor:
        if id(tensor) not in done:
            change = tensor.is_floating_point() and not exact
            done[id(tensor)] = tensor.detach().to(device, dtype if change else tensor.dtype)
        return done[id(tensor)]

    for part in module.modules():
        exact = getattr(part, "in_float32", ())
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = converted(parameter, name in exact)
                part._parameters[name] = nn.Parameter(new, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = converted(buffer, name in exact)
