"""Schedule and weight decay that Detectron2 itself does not have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import d2_frozen
from d2_frozen.engine.optimizer import LR_SCHEDULERS, build_lr_scheduler, build_optimizer
from detectron2.config import CfgNode, get_cfg


def config(*pairs: object) -> CfgNode:
    cfg = d2_frozen.add_frozen_config(get_cfg())
    cfg.merge_from_list(
        ["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.05, *pairs]
    )
    return cfg


@pytest.mark.parametrize("warmup", [0, 4, 20])
@pytest.mark.parametrize("method", ["linear", "constant"])
def test_poly_schedule(warmup: int, method: str) -> None:
    """(1 - i / n) ** power times the factor of the warm-up, as DeepLab's schedule is in Detectron2."""
    options = [
        "SOLVER.LR_SCHEDULER_NAME",
        "WarmupPolyLR",
        "SOLVER.MAX_ITER",
        8,
        "SOLVER.WARMUP_METHOD",
        method,
    ]
    cfg = config(*options, "SOLVER.WARMUP_ITERS", warmup, "SOLVER.WARMUP_FACTOR", 0.5)
    optimizer = build_optimizer(cfg, nn.Linear(2, 2))
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    warm = [1.0 if i >= warmup else 0.5 + 0.5 * i / warmup if method == "linear" else 0.5 for i in range(8)]
    assert rates == pytest.approx([0.1 * factor * (1 - i / 8) ** 0.9 for i, factor in enumerate(warm)])
    with pytest.raises(ValueError, match="WARMUP_METHOD"):
        build_lr_scheduler(config(*options[:-1], "nope"), optimizer)


def test_an_unknown_schedule_is_told_all_that_there_are() -> None:
    cfg = config("SOLVER.LR_SCHEDULER_NAME", "WarmupLinearLR")
    optimizer = build_optimizer(cfg, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"WarmupLinearLR.*{', '.join(LR_SCHEDULERS)}"):
        build_lr_scheduler(cfg, optimizer)
    for name in LR_SCHEDULERS:
        build_lr_scheduler(config("SOLVER.LR_SCHEDULER_NAME", name), optimizer)


def test_embeddings_do_not_decay() -> None:
    model = nn.ModuleDict({"queries": nn.Embedding(3, 2), "head": nn.Linear(2, 2)})
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(config(), model).param_groups
        for p in group["params"]
    }
    assert decay[id(model["queries"].weight)] == 0.0 and decay[id(model["head"].weight)] == 0.05
    assert isinstance(build_optimizer(config(), model), torch.optim.AdamW)


def test_a_kind_of_clipping_that_does_not_exist() -> None:
    clipped = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full"]
    with pytest.raises(
        ValueError, match="CLIP_GRADIENTS.CLIP_TYPE is 'full'; choose one of value, norm, full_model"
    ):
        build_optimizer(config(*clipped), nn.Linear(2, 2))
