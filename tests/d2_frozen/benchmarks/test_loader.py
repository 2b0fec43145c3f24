"""Loader, step and loop are measured for a config, and their ratio follows from them; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2_frozen.bench import main


def test_every_number_of_workers_is_measured(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = ["--batches", "1", "--rounds", "1", "--warmup", "0", "--json", str(tmp_path / "found.json")]
    found = main(["loader", "--config-file", str(tiny_config), *few, "--workers", "0", "1", "SEED", "3"])
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert found["options"] == ["SEED", "3"] and (found["unit"], found["batch"]) == ("images", 2)
    assert found["input"] == "3 x 64 x 64"
    assert list(found["loops"]) == ["0", "1"]
    for loop in found["loops"].values():
        slower = min(loop["loader alone"], loop["step alone"])
        assert loop["whole / min"] == pytest.approx(loop["whole loop"] / slower)
    printed = capsys.readouterr().out
    for heading in ("workers (images/s)", "loader alone", "step alone", "whole loop", "whole / min"):
        assert heading in printed
