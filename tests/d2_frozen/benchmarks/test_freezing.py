"""Frozen against full fine-tuning, the comparison without a name; nothing is timed here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from tiny_runs import ROOT, SEGMENTATION, VIDEO, sem_seg_entries, trained_on, video_entries, write_config

from d2_frozen.bench import main
from d2_frozen.benchmarks import freezing
from d2_frozen.data import shapes
from video_app import moving_shapes


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


@pytest.mark.parametrize("task", ["segmentation", "video"])
def test_models_of_other_tasks_are_measured_too(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freezing, "memory_in_child", lambda command: 300.0)
    data = tmp_path / "data"
    if task == "segmentation":
        shapes.generate(data, train=2, val=1, seed=3, size=64)
        parts = SEGMENTATION, trained_on(sem_seg_entries(data, f"bench_{task}"), iterations=1)
    else:
        moving_shapes.generate(data, train=2, val=1, seed=3, size_px=48, frames=16)
        parts = VIDEO, trained_on(video_entries(data, f"bench_{task}"), iterations=1)
    # Features that are stored are no frozen forward, and full fine-tuning has none.
    stored = {"MODEL": {"FROZEN": {"CACHE": {"DIR": f"{tmp_path}/cache", "VIEWS": 1}}}}
    config = write_config(tmp_path / "tiny.yaml", *parts, stored)
    found = main(["--config-file", str(config), "--rounds", "1", "--warmup", "0"])
    for title in ("training step", "evaluation image"):
        assert all(found[title][name]["backbone"] > 0 for name in ("frozen", "full"))
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_compared_is_said_before_anything_is_read(tiny_config: Path) -> None:
    with pytest.raises(ValueError, match="Measure one head"):
        main(["--config-file", str(ROOT / "configs/quickstart/video.yaml"), "--rounds", "1"])
    with pytest.raises(ValueError, match="DATASETS.TEST is empty"):
        main(["--config-file", str(tiny_config), "DATASETS.TEST", "()"])


def test_a_process_that_measures_memory_trains_and_answers(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--config-file", str(tiny_config), "--memory-of", "all", "--rounds", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["peak"] > 100
