"""What a checkpoint and the run that continues from it differ in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import Flags, loaded_trainer, train
from torch import nn

import d2_frozen
from d2_frozen.engine.checkpoint import CheckpointMismatchError
from d2_frozen.engine.resuming import config_changes, require_fitting_optimizer, tell_of_other_classes
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog


def test_changes_are_named_key_by_key() -> None:
    """Where and how fast it runs does not matter; keys of another version are not there to compare."""
    cfg = d2_frozen.add_frozen_config(get_cfg())
    stored = cfg.dump() + "OF_AN_OLDER_VERSION: 1\n"
    assert config_changes(stored, cfg) == "" == config_changes(None, cfg)
    cfg.merge_from_list(["OUTPUT_DIR", "elsewhere", "SOLVER.BASE_LR", 0.5, "SOLVER.STEPS", (7,)])
    assert config_changes(stored, cfg) == (
        "SOLVER.BASE_LR was 0.001, is 0.5; SOLVER.STEPS was [30000], is [7]"
    )


def test_classes_in_another_order_are_told(caplog: pytest.LogCaptureFixture) -> None:
    MetadataCatalog.get("resuming_val").set(thing_classes=["nut", "bolt"])
    cfg = get_cfg()
    tell_of_other_classes({"classes": ["nut", "bolt"]}, cfg, ["resuming_val"])
    tell_of_other_classes({}, cfg, ["resuming_val"])
    assert not caplog.records
    tell_of_other_classes({"classes": ["bolt", "nut"]}, cfg, ["resuming_val"])
    assert "resuming_val does not have, or has in another order: same names, other order" in caplog.text
    MetadataCatalog.remove("resuming_val")


def test_what_an_optimiser_remembers_must_fit() -> None:
    layer = nn.Linear(2, 2)
    both, one = [{"params": list(layer.parameters())}], [{"params": [layer.weight]}]
    state = torch.optim.AdamW(both).state_dict()
    require_fitting_optimizer(state, torch.optim.AdamW(both), "a.pth")
    with pytest.raises(CheckpointMismatchError, match="a.pth.* another optimiser's .SOLVER.OPTIMIZER"):
        require_fitting_optimizer(state, torch.optim.SGD(both, lr=0.1, momentum=0.9), "a.pth")
    with pytest.raises(
        CheckpointMismatchError, match=r"groups of \[2\], this run in groups of \[1\].*MODEL.WEIGHTS a.pth"
    ):
        require_fitting_optimizer(state, torch.optim.AdamW(one), "a.pth")


def test_resuming_with_changed_settings(flags: Flags, tmp_path: Path) -> None:
    train(flags("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"))
    loaded_trainer(flags("--resume", "SOLVER.BASE_LR", "0.5"))
    assert "SOLVER.BASE_LR was 0.0015, is 0.5" in (tmp_path / "out/log.txt").read_text()
    for key, value, message in (
        ("MODEL.BIFPN.NUM_LAYERS", "2", r"not in the file(.|\n)*MODEL.BIFPN.NUM_LAYERS was 1, is 2"),
        ("SOLVER.OPTIMIZER", "SGD", r"another optimiser's(.|\n)*SOLVER.OPTIMIZER was 'ADAMW', is 'SGD'"),
    ):
        with pytest.raises(CheckpointMismatchError, match=message):
            loaded_trainer(flags("--resume", key, value))
