"""Frozen against full fine-tuning, the comparison without a name; nothing is timed here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from d2_frozen.bench import main
from d2_frozen.benchmarks import freezing


def test_both_models_are_measured_in_turns(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processes that measure memory are asked for each model; here they say 300 and 400 MiB."""
    asked = []

    def memory(command: list[str]) -> float:
        asked.append((command[command.index("--memory-of") + 1], command[-2:]))
        return 300.0 if asked[-1][0] == "all" else 400.0

    monkeypatch.setattr(freezing, "memory_in_child", memory)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    few = ["--rounds", "1", "--warmup", "0", "--json", str(tmp_path / "found.json")]
    options = ["DATASETS.SUBSET.PERCENT", "50.0"]
    found = main(["--config-file", str(tiny_config), *few, *options])
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert asked == [("all", options), ("none", options)]
    assert not list((tmp_path / "temporary").iterdir()), "what preparing the data wrote is gone"
    for title in ("training step", "evaluation image"):
        frozen, full, ratio = (found[title][name] for name in ("frozen", "full", "frozen / full"))
        assert ratio["step"] == pytest.approx(frozen["step"] / full["step"])
        parts = sum(seconds for phase, seconds in frozen.items() if phase != "step")
        assert parts == pytest.approx(frozen["step"])
    assert found["peak memory MiB"] == {"frozen": 300.0, "full": 400.0, "frozen / full": 0.75}
    printed = capsys.readouterr().out
    assert "training step, seconds" in printed and "0.75" in printed


def test_a_process_that_measures_memory_trains_and_answers(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--config-file", str(tiny_config), "--memory-of", "all", "--rounds", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["peak"] > 100
