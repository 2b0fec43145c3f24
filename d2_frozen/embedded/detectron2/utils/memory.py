"""What to do when the GPU is full."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["retry_if_cuda_oom"]

F = TypeVar("F", bound=Callable[..., Any])


def retry_if_cuda_oom(func: F) -> F:
    """Run ``func`` again when it runs out of GPU memory: after emptying the cache, then on the CPU.

    For the last try, arguments that live on the GPU are copied to the CPU (arguments themselves, not what is
    inside lists or dicts), so the result is there too. ``func`` must not change its arguments.
    """

    @functools.wraps(func)
    def careful(*args: Any, **kwargs: Any) -> Any:
        for prepare in (lambda: None, torch.cuda.empty_cache):
            prepare()
            try:
                return func(*args, **kwargs)
            except torch.cuda.OutOfMemoryError:
                # Left here, not handled here: inside the handler the traceback keeps the tensors alive.
                pass
        logging.getLogger(__name__).info("%s does not fit on the GPU; it runs on the CPU.", func)
        return func(*map(_to_cpu, args), **{name: _to_cpu(value) for name, value in kwargs.items()})

    return careful  # type: ignore[return-value]


def _to_cpu(value: Any) -> Any:
    device = getattr(value, "device", None)
    on_gpu = getattr(device, "type", None) == "cuda" and hasattr(value, "to")
    return value.to(device="cpu") if on_gpu else value
