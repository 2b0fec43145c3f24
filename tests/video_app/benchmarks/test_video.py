"""The comparison runs on generated clips and says all that it should; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_runs import ROOT, VIDEO, trained_on, video_entries, write_config

from d2_frozen.bench import main
from detectron2.config import CfgNode
from video_app.benchmarks import video
from video_app.benchmarks.reading import memory_growth_mib
from video_app.clips.decoder import BadClip, ClipDecoder, VideoReading
from video_app.clips.reader import installed_readers
from video_app.clips.sampling import SamplingPlan
from video_app.moving_shapes import generate


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Ten clips of 32 px, a backbone with random weights, two blocks."""
    generate(tmp_path / "clips", train=10, val=0, size_px=32, frames=16)
    entries = video_entries(tmp_path / "clips", tmp_path.name, parts=("train",))
    changes = {"MODEL": {"VIDEO_HEAD": {"NUM_BLOCKS": 1, "WIDTH": 64}}, "VIDEO": {"NUM_FRAMES": 2}}
    return write_config(tmp_path / "tiny.yaml", VIDEO, trained_on(entries, iterations=1), changes)


def test_every_part_is_measured(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = [
        "--rounds",
        "1",
        "--warmup",
        "0",
        "--clips",
        "2",
        "--opens",
        "2",
        "--batches",
        "1",
        "--workers",
        "1",
    ]
    found = main(["video", "--config-file", str(config), *few, "--json", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert list(found["reading"]) == installed_readers()
    assert set(found["model"]) == {"frozen forward", "head step", "both"}
    loop = found["loop"]["1"]
    slower = min(loop["loader alone"], loop["step alone"])
    assert loop["whole / min"] == pytest.approx(loop["whole loop"] / slower)
    printed = capsys.readouterr().out
    for heading in ("decode + sample", "growth, MiB", "frozen forward", "head step", "whole / min"):
        assert heading in printed


def test_config_options_may_follow_the_workers(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They were taken for numbers of workers."""
    asked = []
    monkeypatch.setattr(video, "compare_readers", lambda *_: {})
    monkeypatch.setattr(video, "measure_model", lambda *_: {})

    def compare(cfg: CfgNode, workers: list[int], *_: int) -> dict:
        asked.append((workers, cfg.SEED))
        return {"loops": {}}

    monkeypatch.setattr(video.loader, "compare", compare)
    monkeypatch.setattr(video, "report", lambda result: "")
    result = main(["video", "--config-file", str(config), "--workers", "1", "2", "SEED", "3"])
    assert asked == [([1, 2], 3)] and result["options"] == ["SEED", "3"]


def test_the_data_path_is_measured_for_clips(config: Path) -> None:
    few = ["--batches", "1", "--rounds", "1", "--warmup", "0", "--workers", "1"]
    found = main(["loader", "--config-file", str(config), *few])
    assert (found["unit"], found["batch"], found["input"]) == ("clips", 2, "1 x 2 x 3 x 32 x 32")
    assert found["loops"]["1"]["whole / min"] > 0


def test_a_frozen_video_model_is_asked_for(config: Path) -> None:
    with pytest.raises(SystemExit, match="FREEZE all"):
        main(["video", "--config-file", str(config), "MODEL.BACKBONE.FREEZE", "none"])
    with pytest.raises(SystemExit, match="is a config of detection"):
        main(["video", "--config-file", str(ROOT / "configs/quickstart/detection.yaml")])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read from /proc")
@pytest.mark.parametrize("reader", [*installed_readers(), "folder"])
def test_readers_do_not_grow(video: Path, tmp_path: Path, reader: str) -> None:
    """150 files, every third one cut short or no video. A leak of one frame each (56 KiB) would be 8 MiB."""
    cut, text = tmp_path / "cut.mp4", tmp_path / "text.mp4"
    cut.write_bytes(video.read_bytes()[:-500])
    text.write_text("not a video")
    files = [str(video), str(video), str(cut), str(video), str(video), str(text)]
    if reader == "folder":
        for k in range(3):
            cv2.imwrite(str(tmp_path / f"{k}.png"), np.zeros((120, 160, 3), np.uint8))
        files = [str(tmp_path)]
    decoder = ClipDecoder(VideoReading("auto", short_side_px=64))
    decoder.readers = [reader] if reader != "folder" else decoder.readers

    def read(count: int) -> None:
        try:
            decoder.read(files[count % len(files)], SamplingPlan("uniform", frames=4))
        except BadClip:
            assert files[count % len(files)] in (str(cut), str(text))

    try:
        assert memory_growth_mib(decoder, read, opens=150) < 5
    finally:
        decoder.close()
