"""Facts about optimisers and schedules that the golden files do not hold."""

from __future__ import annotations

import pytest
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import nn

from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping


def _cfg(*options):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 20, "SOLVER.STEPS", (10,), "SOLVER.WARMUP_ITERS", 4, *options])
    return cfg


def test_resumed_schedule_equals_the_uninterrupted_one():
    def rates(stop_at):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
        scheduler = build_lr_scheduler(_cfg(), optimizer)
        seen = []
        for iteration in range(20):
            if iteration == stop_at:
                saved = optimizer.state_dict(), scheduler.state_dict()
                optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
                scheduler = build_lr_scheduler(_cfg(), optimizer)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    assert rates(stop_at=None) == rates(stop_at=7) == rates(stop_at=2)


def test_full_gradient_norm_is_cut_to_clip_value():
    """One step of plain SGD with learning rate 1 moves a parameter by its clipped gradient."""
    layer = nn.Linear(4, 1, bias=False)
    cfg = _cfg("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm")
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.25
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD(layer.parameters(), lr=1.0))
    assert isinstance(optimizer, torch.optim.SGD)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(layer.weight, 3.0)
    optimizer.step()
    assert (layer.weight.detach() - before).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_frozen_parameters_are_not_in_the_optimizer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(_cfg(), model)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(model[1].parameters())


def test_multiplier_must_be_a_schedule():
    from detectron2.solver.lr_scheduler import LRMultiplier

    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    with pytest.raises(ValueError):
        LRMultiplier(optimizer, multiplier=lambda where: 1.0, max_iter=3)
    assert LRMultiplier(optimizer, ConstantParamScheduler(0.5), max_iter=3).get_last_lr() == [0.25]
