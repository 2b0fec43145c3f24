"""What ``bench accuracy`` says of a head is what evaluation says of it, in each mode."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from d2_frozen import bench
from d2_frozen.train_net import main

Flags = Callable[..., Namespace]


def test_a_detector_in_three_modes(flags: Flags, tiny_config: Path, tmp_path: Path, capsys) -> None:
    main(flags("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"))
    before = sorted((tmp_path / "out").rglob("*"))
    head = ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    modes = ["--modes", "fp32", "bf16", "fp8", "--batches", "2"]
    result = bench.main(["accuracy", "--config-file", str(tiny_config), *modes, *head])
    assert sorted((tmp_path / "out").rglob("*")) == before
    exact, low, impossible = result["modes"].values()
    assert list(exact["error"]) == list(low["error"]) == ["res2", "res3", "res4", "res5"]
    assert all(0 <= error < 1e-5 for error in exact["error"].values())
    assert all(1e-4 < error < 0.05 for error in low["error"].values())
    assert "fp8 needs a GPU" in impossible["failed"]
    out = capsys.readouterr().out
    assert "bbox/AP" in out and "segm/AP" in out and "fp8: RuntimeError: MODEL.FROZEN.PRECISION: fp8" in out
    for mode, measured in (("fp32", exact), ("bf16", low)):
        again = main(flags("--eval-only", *head, "MODEL.FROZEN.PRECISION", mode))
        expected = {
            f"{task}/{name}": value for task, of_task in again.items() for name, value in of_task.items()
        }
        assert str(measured["metrics"]) == str(expected)  # as text, so that NaN equals NaN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which head"),
        (["MODEL.WEIGHTS", "x.pth", "DATASETS.TEST", "()"], "nothing to evaluate on"),
        (["--modes", "bf17", "MODEL.WEIGHTS", "x.pth"], "mode 'bf17' is none of fp32"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], message: str, tiny_config: Path) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(["accuracy", "--config-file", str(tiny_config), *arguments])


def test_a_model_that_trains_whole_has_no_modes(flags: Flags, tiny_config: Path, tmp_path: Path) -> None:
    main(flags("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()", "MODEL.BACKBONE.FREEZE", "none"))
    options = ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"), "MODEL.BACKBONE.FREEZE", "none"]
    with pytest.raises(ValueError, match="0 frozen backbones.*FREEZE is 'none'"):
        bench.main(
            ["accuracy", "--config-file", str(tiny_config), "--modes", "fp32", "--batches", "1", *options]
        )
