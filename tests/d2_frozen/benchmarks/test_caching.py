"""Steps from the cache against live ones run the comparison's arithmetic; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2_frozen.bench import main


def test_cached_and_live_steps_of_a_config(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every batch of the rounds is stored before: all of it is found. Four maps of 64 px in float32."""
    few = ["--rounds", "1", "--warmup", "1", "--json", str(tmp_path / "found.json")]
    found = main(["cache", "--config-file", str(tiny_config), *few, "MODEL.FROZEN.CACHE.VIEWS", "2"])
    assert json.loads((tmp_path / "found.json").read_text()) == found
    steps = found["training step"]
    assert list(steps) == ["cached", "live", "cached / live"]
    head = steps["live"]["step"] - steps["live"]["backbone"] - steps["live"]["data"]
    ratio = (steps["cached"]["step"] - steps["cached"]["data"]) / head
    assert found["cached step / head-only part of the live step"] == pytest.approx(ratio)
    assert found["hit rate"] == 1.0
    maps = 4 * sum(
        channels * (64 // stride) ** 2 for channels, stride in ((32, 4), (64, 8), (128, 16), (256, 32))
    )
    assert maps <= found["bytes per sample"] < maps + 1024, "with a head of its entry"
    assert found["options"] == ["MODEL.FROZEN.CACHE.VIEWS", "2"]
    printed = capsys.readouterr().out
    assert "cached / live" in printed and f"without data: {ratio:.2f}" in printed
