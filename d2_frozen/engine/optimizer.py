"""Optimiser and schedule by config: SGD or AdamW over Detectron2's parameter groups, gradient clipping included."""

from __future__ import annotations

from typing import Any

import torch
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from d2_frozen.engine.backbone_rates import own_settings
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_scheduler
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)

CLIP_TYPES = ("value", "norm", "full_model")
LR_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", "WarmupPolyLR")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over the parameters that require grad; frozen ones are in no group.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE may be Detectron2's "value" and "norm" (each parameter on its own), or
    "full_model" (one norm over all parameters, as Mask2Former and Swin users have it).

    The trained part of the bottom-up network follows SOLVER.BACKBONE_MULTIPLIER and LAYER_DECAY.

    Raises:
        ValueError: unknown SOLVER.OPTIMIZER or CLIP_TYPE, nothing to train, or a rate for a bottom-up network that is
            frozen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no parameter to train; check MODEL.BACKBONE.FREEZE and the heads.")
    solver = cfg.SOLVER
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "SGD": (torch.optim.SGD, {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}),
        "ADAMW": (torch.optim.AdamW, {}),
    }
    if solver.OPTIMIZER.upper() not in kinds:
        raise ValueError(f"SOLVER.OPTIMIZER: {solver.OPTIMIZER!r} is unknown; choose SGD or ADAMW.")
    optimizer_class, options = kinds[solver.OPTIMIZER.upper()]
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
    )
    groups += [
        {"params": [parameter], "weight_decay": solver.WEIGHT_DECAY_EMBED}
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    own = own_settings(cfg, model, groups)
    groups = reduce_param_groups([*groups, *own])
    if all(p.device.type == "cpu" for group in groups for p in group["params"]):
        # On CPU one fused loop per parameter instead of some ten operations: six times faster with small heads.
        # Not on GPU, where AMP would hand a fused optimiser gradients that are still scaled, and clipping is here.
        options["fused"] = True
    clipping = _clipping_class(cfg, optimizer_class)
    return clipping(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **options)


def _clipping_class(cfg: CfgNode, optimizer_class: Any) -> Any:
    """The optimiser class, with SOLVER.CLIP_GRADIENTS before each step."""
    settings = cfg.SOLVER.CLIP_GRADIENTS
    if settings.ENABLED and settings.CLIP_TYPE not in CLIP_TYPES:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {settings.CLIP_TYPE!r}; choose one of {', '.join(CLIP_TYPES)}."
        )
    if not settings.ENABLED or settings.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, optimizer_class)

    class ClipsWholeModel(optimizer_class):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            parameters = [p for group in self.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, settings.CLIP_VALUE, norm_type=settings.NORM_TYPE)
            return super().step(closure)

    return ClipsWholeModel


class PolyWithWarmup(ParamScheduler):
    """(1 - t) ** power of progress t, times what a warm-up leaves of it: DeepLab's product, also during the warm-up.

    Args:
        power: 1 falls in a straight line.
        factor: of the rate at the start.
        share: of the run that warms up; above 1, it ends in the warm-up.
        method: "linear" (from ``factor`` to 1) or "constant" (``factor`` until it ends).
    Raises:
        ValueError: another method.
    """

    def __init__(self, power: float, factor: float, share: float, method: str) -> None:
        if method not in ("linear", "constant"):
            raise ValueError(f"SOLVER.WARMUP_METHOD is {method!r}; choose linear or constant.")
        self.power, self.factor, self.share, self.method = power, factor, share, method

    def __call__(self, where: float) -> float:
        rate = max(0.0, 1 - where) ** self.power
        if where >= self.share:
            return rate
        done = where / self.share if self.method == "linear" else 0.0
        return rate * (self.factor + done * (1 - self.factor))


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Detectron2's schedules, and "WarmupPolyLR" of its DeepLab project, (1 - progress) ** SOLVER.POLY_LR_POWER.

    As there, the latter knows no SOLVER.RESCALE_INTERVAL: it goes to 0 at MAX_ITER, whatever the warm-up.

    Raises:
        ValueError: an unknown SOLVER.LR_SCHEDULER_NAME or WARMUP_METHOD.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME not in LR_SCHEDULERS:
        raise ValueError(
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}; use one of {', '.join(LR_SCHEDULERS)}."
        )
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2_scheduler(cfg, optimizer)
    schedule = PolyWithWarmup(
        solver.POLY_LR_POWER,
        solver.WARMUP_FACTOR,
        solver.WARMUP_ITERS / solver.MAX_ITER,
        solver.WARMUP_METHOD,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)
