"""Learning rate as a function of the iteration: fvcore's parameter schedules, with a warm-up, for torch
optimisers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["LRMultiplier", "LRScheduler", "WarmupCosineLR", "WarmupMultiStepLR", "WarmupParamScheduler"]

WarmupMethod = Literal["linear", "constant"]


class WarmupParamScheduler(CompositeParamScheduler):
    """Another schedule, with a warm-up in place of its beginning.

    Args:
        scheduler: what follows the warm-up; maps progress in [0, 1] to a value.
        warmup_factor: first value, relative to ``scheduler``'s first one.
        warmup_length: part of the training in [0, 1].
        warmup_method: "linear", up to the value that ``scheduler`` has where the warm-up ends, or "constant".
        rescale_interval: squeeze ``scheduler`` into the rest; otherwise its beginning is cut off.
    Raises:
        ValueError: an unknown method.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: WarmupMethod = "linear",
        rescale_interval: bool = False,
    ) -> None:
        first = warmup_factor * scheduler(0.0)
        if warmup_method == "constant":
            warmup: ParamScheduler = ConstantParamScheduler(first)
        elif warmup_method == "linear":
            # Where the warm-up ends the schedule takes over without a jump.
            last = scheduler(0.0 if rescale_interval else warmup_length)
            warmup = LinearParamScheduler(first, last)
        else:
            raise ValueError(f'SOLVER.WARMUP_METHOD is {warmup_method!r}; use "linear" or "constant".')
        super().__init__(
            [warmup, scheduler],
            lengths=[warmup_length, 1.0 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Each group's learning rate is its own initial one, times one schedule for all.

    Args:
        multiplier: maps progress in [0, 1] to the factor; has no state.
        max_iter: iterations that make progress 1.
        last_iter: last iteration that was done, -1 for none.
    Raises:
        ValueError: ``multiplier`` is no fvcore ParamScheduler.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ) -> None:
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(
                f"multiplier must be a ParamScheduler of fvcore, got {type(multiplier).__name__}."
            )
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict[str, Any]:
        # Only what cannot be had from the config: so a resumed run may follow an edited schedule.
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float]:
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [rate * factor for rate in self.base_lrs]


class _WarmupLR(LRScheduler):
    """Older interface: warm-up factor times decay, both of the iteration. Prefer ``LRMultiplier``."""

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_factor: float,
        warmup_iters: int,
        warmup_method: str,
        last_epoch: int,
    ) -> None:
        if warmup_method not in ("linear", "constant"):
            raise ValueError(f'warmup_method is {warmup_method!r}; use "linear" or "constant".')
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        factor = self._warmup() * self._decay()
        return [rate * factor for rate in self.base_lrs]

    def _warmup(self) -> float:
        if self.last_epoch >= self.warmup_iters:
            return 1.0
        if self.warmup_method == "constant":
            return self.warmup_factor
        done = self.last_epoch / self.warmup_iters
        return self.warmup_factor + (1.0 - self.warmup_factor) * done

    def _decay(self) -> float:
        raise NotImplementedError

    def _compute_values(self) -> list[float]:
        return self.get_lr()


class WarmupMultiStepLR(_WarmupLR):
    """Times ``gamma`` at each of the ``milestones`` (iterations, increasing)."""

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: WarmupMethod = "linear",
        last_epoch: int = -1,
    ) -> None:
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must increase, got {list(milestones)}.")
        self.milestones = milestones
        self.gamma = gamma
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def _decay(self) -> float:
        return self.gamma ** bisect_right(self.milestones, self.last_epoch)


class WarmupCosineLR(_WarmupLR):
    """Half a cosine, from 1 down to 0 at ``max_iters``."""

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: WarmupMethod = "linear",
        last_epoch: int = -1,
    ) -> None:
        self.max_iters = max_iters
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def _decay(self) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * self.last_epoch / self.max_iters)
