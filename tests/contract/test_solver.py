"""Facts about optimisers and schedules that the golden files do not hold."""

from __future__ import annotations

import pytest
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import nn

from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)


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


def test_groups_of_equal_settings_are_one():
    """The later settings of a parameter win; groups and parameters stay in the order they first come in."""
    given = [
        {"params": ["a", "b", "c"], "lr": 1.0},
        {"params": ["b"], "weight_decay": 0.5},
        {"params": ["d"], "lr": 1.0},
    ]
    assert reduce_param_groups(given) == [
        {"params": ["a", "c", "d"], "lr": 1.0},
        {"params": ["b"], "lr": 1.0, "weight_decay": 0.5},
    ]
    assert len(given) == 3 and given[0]["params"] == ["a", "b", "c"]


def test_a_model_has_one_group_per_setting():
    """Norms and biases differ from the rest: three groups, however many layers there are."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(3)))
    groups = get_default_optimizer_params(
        model, base_lr=0.1, weight_decay=0.05, weight_decay_norm=0.0, bias_lr_factor=2.0
    )
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert settings == [
        {"lr": 0.1, "weight_decay": 0.05},
        {"lr": 0.2, "weight_decay": 0.05},
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.2, "weight_decay": 0.0},
    ]
    assert [len(group["params"]) for group in groups] == [3, 3, 3, 3]


def _rates(cfg):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_warm_up_ends_at_the_value_of_the_schedule():
    """A warm-up of 10 iterations over a step at 5: it climbs towards 0.1, not 1, and goes on without a jump."""
    cfg = _cfg("SOLVER.STEPS", (5,), "SOLVER.WARMUP_ITERS", 10, "SOLVER.WARMUP_FACTOR", 0.01)
    rates = _rates(cfg)
    line = [0.01 + (0.1 - 0.01) * i / 10 for i in range(10)]
    assert rates == pytest.approx(line + [0.1] * 10)
    cosine = _rates(_cfg("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.WARMUP_ITERS", 10))
    assert cosine[10] == pytest.approx(0.5)  # half way down the cosine
    assert cosine[9] == pytest.approx(0.5 * 0.9 + 0.0001, abs=1e-3)


def test_a_step_at_the_last_iteration_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    with pytest.raises(ValueError):
        build_lr_scheduler(_cfg("SOLVER.STEPS", (10, 20)), optimizer)
    assert _rates(_cfg("SOLVER.STEPS", (10, 21)))[-1] == pytest.approx(0.1)  # beyond the end: ignored
