"""Is the model being run, or recorded by ``torch.fx``? Checks of values make sense only in the first case."""

from __future__ import annotations

import torch

__all__ = ["assert_fx_safe", "is_fx_tracing"]


def is_fx_tracing() -> bool:
    """Is a symbolic trace in progress?"""
    # The flag, because the function of that name warns in newer versions that it means torch.export too.
    return bool(getattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", False))


@torch.fx.wrap
def assert_fx_safe(condition: bool, message: str) -> None:
    """``assert condition, message``, left out while tracing, where ``condition`` has no value."""
    if is_fx_tracing() or torch.jit.is_scripting() or isinstance(condition, torch.fx.Proxy):
        return
    assert condition, message
