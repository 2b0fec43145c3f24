"""The command line: Detectron2's flags, and errors before anything is built."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from d2_frozen.train_net import argument_parser, evaluation_model, main, setup
from detectron2.engine import default_argument_parser

ROOT = Path(__file__).resolve().parents[2]


def test_flags_are_detectron2s() -> None:
    flags = {tuple(action.option_strings) for action in argument_parser()._actions}
    assert flags == {tuple(action.option_strings) for action in default_argument_parser()._actions}
    named = {name for option in flags for name in option}
    assert {
        "--config-file",
        "--resume",
        "--eval-only",
        "--num-gpus",
        "--num-machines",
        "--machine-rank",
    } <= named


@pytest.mark.parametrize("entry", [["train_net.py"], ["-m", "d2_frozen.train_net"]])
def test_help_works_from_both_entries(entry: list[str]) -> None:
    done = subprocess.run([sys.executable, *entry, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--config-file" in done.stdout and "--dist-url" in done.stdout


Flags = Callable[..., Namespace]


def test_missing_weights_are_named(flags: Flags) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        main(flags("--eval-only", "MODEL.WEIGHTS", "nowhere.pth"))


def test_weights_for_another_class_count_are_refused_at_evaluation(flags: Flags, tmp_path: Path) -> None:
    cfg = setup(flags("--eval-only"))
    model = evaluation_model(cfg)
    state = {key: value for key, value in model.state_dict().items() if "bottom_up" not in key}
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(3, 32)
    torch.save({"model": {**model.state_dict(), **state}}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=r"cls_score.weight.*\(3, 32\).*\(7, 32\)"):
        main(flags("--eval-only", "MODEL.WEIGHTS", str(tmp_path / "other.pth")))


def test_unknown_key_is_an_error(flags: Flags) -> None:
    with pytest.raises((AssertionError, KeyError), match="OPTIMISER"):
        setup(flags("SOLVER.OPTIMISER", "ADAMW"))


def test_mismatching_class_count_is_an_error_before_training(flags: Flags) -> None:
    with pytest.raises(ValueError, match=r"NUM_CLASSES.*4.*6"):
        setup(flags("MODEL.ROI_HEADS.NUM_CLASSES", "4"))


def test_config_yaml_in_the_output_repeats_the_run(flags: Flags, tmp_path: Path) -> None:
    first = setup(flags("SOLVER.MAX_ITER", "5"))
    again = setup(argument_parser().parse_args(["--config-file", str(tmp_path / "out" / "config.yaml")]))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(first.dump())
