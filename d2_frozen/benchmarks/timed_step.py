"""Seconds of one training step by phase: data, backbone, neck and heads, backward and update."""

from __future__ import annotations

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


def timed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    next_batch: Callable[[], Any],
    backbone: Watch,
    now: Clock,
) -> Seconds:
    """Train one step; seconds by PHASES."""
    backbone.reset()
    start = now()
    batch = next_batch()
    loaded = now()
    with EventStorage():
        loss = sum(model(batch).values())
    forwarded = now()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    end = now()
    return {
        "data": loaded - start,
        "backbone": backbone.seconds,
        "neck+heads": forwarded - loaded - backbone.seconds,
        "backward+update": end - forwarded,
        "step": end - start,
    }
