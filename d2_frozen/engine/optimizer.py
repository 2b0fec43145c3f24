"""The optimiser by config: SGD as Detectron2 builds it, or AdamW over the same parameter groups."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over the parameters that require grad; frozen ones are in no group.

    Raises:
        ValueError: unknown SOLVER.OPTIMIZER, or nothing to train.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no parameter to train; check MODEL.BACKBONE.FREEZE and the heads.")
    name = cfg.SOLVER.OPTIMIZER.upper()
    if name == "SGD":
        return build_sgd(cfg, model)
    if name == "ADAMW":
        groups = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(groups, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    raise ValueError(f"SOLVER.OPTIMIZER: {cfg.SOLVER.OPTIMIZER!r} is unknown; choose SGD or ADAMW.")
