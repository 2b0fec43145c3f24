"""Optimiser and learning-rate schedule as SOLVER.* says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    StepWithFixedGammaParamScheduler,
)
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler

logger = logging.getLogger(__name__)

# Layers whose parameters are under WEIGHT_DECAY_NORM. FrozenBatchNorm2d has buffers only.
_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norm, synchronised ones too
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD over the trainable parameters of ``model``, with gradient clipping where SOLVER.CLIP_GRADIENTS is
    on.
    """
    solver = cfg.SOLVER
    # WEIGHT_DECAY itself is the optimiser's default: groups state a weight decay only where it is another
    # one.
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    optimizer_class = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
    return optimizer_class(
        groups,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
        foreach=True,
    )


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimiser; parameters with equal settings share a group.

    Args:
        base_lr: learning rate; None leaves it to the optimiser.
        weight_decay: likewise.
        weight_decay_norm: for the parameters of normalisation layers.
        bias_lr_factor: learning rate of parameters named "bias", relative to ``base_lr``.
        weight_decay_bias: for parameters named "bias"; stronger than ``weight_decay_norm``.
        lr_factor_func: full parameter name -> factor of its learning rate (layer-wise decay). The name of a
            parameter of the model itself begins with a dot.
        overrides: last part of a parameter's name -> settings, e.g. ``{"relative_bias": {"weight_decay":
            0.0}}``.
    Returns:
        ``[{"params": [...], "lr": ..., "weight_decay": ...}, ...]``: trainable parameters, each once.
    Raises:
        ValueError: a factor without ``base_lr``, or settings for "bias" in two places.
    """
    for name, given in (
        ("bias_lr_factor", bias_lr_factor not in (None, 1.0)),
        ("lr_factor_func", lr_factor_func is not None),
    ):
        if given and base_lr is None:
            raise ValueError(f"{name} scales base_lr: give base_lr too.")

    common = _without_none(lr=base_lr, weight_decay=weight_decay)
    by_leaf = dict(overrides or {})
    bias = _without_none(weight_decay=weight_decay_bias)
    if bias_lr_factor not in (None, 1.0):
        bias["lr"] = base_lr * bias_lr_factor
    if bias:
        if "bias" in by_leaf:
            raise ValueError(
                "biases are set twice: by overrides['bias'], and by bias_lr_factor or weight_decay_bias."
            )
        by_leaf["bias"] = bias

    singles = []
    for module, name, parameter in _trainable_parameters(model):
        settings = dict(common)
        if weight_decay_norm is not None and _is_norm(module):
            settings["weight_decay"] = weight_decay_norm
        if lr_factor_func is not None:
            settings["lr"] *= lr_factor_func(name)
        settings.update(by_leaf.get(name.rsplit(".", 1)[-1], {}))
        singles.append({"params": [parameter], **settings})
    return reduce_param_groups(singles)


def reduce_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups that say the same as ``params``, one for each set of settings.

    Args:
        params: ``[{"params": [...], "lr": ..., ...}, ...]``. A parameter may come in several groups; of its
            settings, those of a later group win.
    Returns:
        Groups and their parameters in the order in which they first come; ``params`` is left as it is.
    """
    merged: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    for single in _expand_param_groups(params):
        (parameter,) = single.pop("params")
        merged.setdefault(tuple(sorted(single.items())), {**single, "params": []})["params"].append(parameter)
    return list(merged.values())


def _expand_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group per parameter, with all its settings."""
    settings_of: dict[Any, dict[str, Any]] = {}
    for group in params:
        own = {name: value for name, value in group.items() if name != "params"}
        for parameter in group["params"]:
            settings_of.setdefault(parameter, {"params": [parameter]}).update(own)
    return list(settings_of.values())


def _trainable_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, full name, parameter), shared ones once."""
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module, f"{module_name}.{name}", parameter


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORM_LAYERS)


def _without_none(**settings: float | None) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


class GradientClipType(Enum):
    """Values of SOLVER.CLIP_GRADIENTS.CLIP_TYPE: clip each element, or the norm of each parameter."""

    VALUE = "value"
    NORM = "norm"


def _clip_function(settings: CfgNode) -> Callable[[nn.Parameter], Any]:
    kind = GradientClipType(settings.CLIP_TYPE)  # ValueError that names the bad value
    if kind is GradientClipType.VALUE:
        return lambda parameter: nn.utils.clip_grad_value_(parameter, settings.CLIP_VALUE)
    return lambda parameter: nn.utils.clip_grad_norm_(parameter, settings.CLIP_VALUE, settings.NORM_TYPE)


def maybe_add_gradient_clipping(
    cfg: CfgNode, optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer
) -> Any:
    """Make ``step`` clip the gradients first, if SOLVER.CLIP_GRADIENTS.ENABLED.

    Args:
        optimizer: a class, or an optimiser that is there already (changed in place).
    Returns:
        The class ``<Name>WithGradientClip``, or the same optimiser with that class; unchanged if clipping is
        off.
    Raises:
        ValueError: CLIP_TYPE is neither "value" nor "norm".
    """
    settings = cfg.SOLVER.CLIP_GRADIENTS
    if not settings.ENABLED:
        return optimizer
    is_class = isinstance(optimizer, type)
    base = optimizer if is_class else type(optimizer)
    clipped = _with_clipping(base, _clip_function(settings.clone()))
    if is_class:
        return clipped
    optimizer.__class__ = clipped
    return optimizer


def _with_clipping(base: type, clip: Callable[[nn.Parameter], Any]) -> type:
    def step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                # What the losses do not reach has none; torch's clipping by value does not take that.
                if parameter.grad is not None:
                    clip(parameter)
        return base.step(self, closure)

    return type(f"{base.__name__}WithGradientClip", (base,), {"step": step, "__module__": base.__module__})


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Warm-up, then the schedule that SOLVER.LR_SCHEDULER_NAME says.

    Raises:
        ValueError: an unknown name or warm-up method, or a step at MAX_ITER.
        AssertionError: BASE_LR_END is above BASE_LR.
    """
    solver = cfg.SOLVER
    try:
        build = _SCHEDULES[solver.LR_SCHEDULER_NAME]
    except KeyError:
        raise ValueError(
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}; use one of {', '.join(_SCHEDULES)}."
        ) from None
    schedule = WarmupParamScheduler(
        build(solver),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)


def _multi_step(solver: CfgNode) -> ParamScheduler:
    steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
    if len(steps) < len(solver.STEPS):
        late = sorted(set(solver.STEPS) - set(steps))
        logger.warning("SOLVER.STEPS %s beyond SOLVER.MAX_ITER %d are ignored.", late, solver.MAX_ITER)
    if solver.MAX_ITER in steps:
        raise ValueError(
            f"SOLVER.STEPS {tuple(solver.STEPS)} has a step at SOLVER.MAX_ITER = {solver.MAX_ITER}, where "
            "training is over: remove it, or train longer."
        )
    values = [solver.GAMMA**drops for drops in range(len(steps) + 1)]
    return MultiStepParamScheduler(values, milestones=steps, num_updates=solver.MAX_ITER)


def _cosine(solver: CfgNode) -> ParamScheduler:
    end = solver.BASE_LR_END / solver.BASE_LR
    if not 0.0 <= end <= 1.0:
        raise AssertionError(
            f"SOLVER.BASE_LR_END ({solver.BASE_LR_END}) must lie in 0 .. SOLVER.BASE_LR ({solver.BASE_LR})."
        )
    return CosineParamScheduler(1.0, end)


def _fixed_gamma(solver: CfgNode) -> ParamScheduler:
    return StepWithFixedGammaParamScheduler(
        base_value=1.0, num_decays=solver.NUM_DECAYS, gamma=solver.GAMMA, num_updates=solver.MAX_ITER
    )


_SCHEDULES: dict[str, Callable[[CfgNode], ParamScheduler]] = {
    "WarmupMultiStepLR": _multi_step,
    "WarmupCosineLR": _cosine,
    "WarmupStepWithFixedGammaLR": _fixed_gamma,
}
