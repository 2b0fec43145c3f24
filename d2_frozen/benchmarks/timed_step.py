"""Seconds of one training step by phase: data, backbone, neck and heads, backward and update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from d2_frozen.benchmarks.measuring import Clock, Seconds
from detectron2.utils.events import EventStorage

PHASES = ("data", "backbone", "neck+heads", "backward+update", "step")


class Watch:
    """Seconds that a module's forward takes, summed since the last ``reset``."""

    def __init__(self, module: nn.Module, now: Clock) -> None:
        self.seconds = 0.0
        started = 0.0

        def before(*_: Any) -> None:
            nonlocal started
            started = now()

        def after(*_: Any) -> None:
            self.seconds += now() - started

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def reset(self) -> None:
        self.seconds = 0.0


class MixedPrecision:
    """The arithmetic of SOLVER.AMP: bfloat16 on CPU, as FrozenTrainer does it; scaled float16 on CUDA, as AMPTrainer.

    Args:
        enabled: SOLVER.AMP.ENABLED; False changes nothing.
        device: type of the model's device.
    """

    def __init__(self, enabled: bool = False, device: str = "cpu") -> None:
        self.enabled, self.device = enabled, device
        self.scaler = torch.amp.GradScaler(device, enabled=enabled and device == "cuda")

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        """Around the forward pass."""
        if not self.enabled:
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.float16 if self.device == "cuda" else torch.bfloat16)

    def backward_and_update(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


def timed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    next_batch: Callable[[], Any],
    backbone: Watch,
    now: Clock,
    precision: MixedPrecision | None = None,
) -> Seconds:
    """Train one step; seconds by PHASES."""
    precision = precision or MixedPrecision()
    backbone.reset()
    start = now()
    batch = next_batch()
    loaded = now()
    with EventStorage(), precision.forward():
        loss = sum(model(batch).values())
    forwarded = now()
    optimizer.zero_grad()
    precision.backward_and_update(loss, optimizer)
    end = now()
    return {
        "data": loaded - start,
        "backbone": backbone.seconds,
        "neck+heads": forwarded - loaded - backbone.seconds,
        "backward+update": end - forwarded,
        "step": end - start,
    }
