"""Copies of modules that share their tensors, so that a change of one copy's structure costs no memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def with_shared_tensors(module: nn.Module) -> nn.Module:
    """A copy that may be rearranged; its parameters and buffers are those of ``module``, in eval mode."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo).eval()


def convert_tensors(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Replace each tensor of the module, where others may share it: in the module only.

    nn.Module's own ``to`` would change the shared parameters themselves.
    """
    done: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = done.setdefault(id(parameter), convert(parameter.detach()))
                part._parameters[name] = nn.Parameter(new, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = done.setdefault(id(buffer), convert(buffer))
