"""``study cka`` on video heads: an example is a clip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import VIDEO, write_config

from d2_frozen.study.__main__ import main


@pytest.fixture
def config(write_video: Callable[..., Path], tmp_path: Path) -> Path:
    """Five videos of different length, and one that is none."""
    names = [write_video(f"{count}.mp4", count=count, size=(48, 64)).name for count in (9, 13, 17, 21, 25)]
    name = f"five_of_{tmp_path.name}"
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    lines = [f"{name} {i % 2}" for i, name in enumerate([*names, "broken.mp4"])]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    entry = {"name": name, "type": "video_list", "list": f"{tmp_path}/list.txt", "classes": ["a", "b"]}
    return write_config(
        tmp_path / "clips.yaml",
        VIDEO,
        {
            "MODEL": {"VIDEO_HEAD": {"NAME": "AttentiveProbe", "NUM_BLOCKS": 3, "WIDTH": 32}},
            "VIDEO": {"STRIDE": 1, "SHORT_SIDE": 48, "TEST": {"CLIPS": 2, "CROPS": 3}},
            "DATASETS": {"REGISTER": [entry], "TRAIN": [name], "TEST": [name]},
            "OUTPUT_DIR": f"{tmp_path}/out",
            "SEED": 1,
        },
    )


def test_blocks_and_pooling_query(config: Path, tmp_path: Path) -> None:
    flags = ["--config-file", str(config), "--batch", "6", "--output", str(tmp_path), "--name", "blocks"]
    assert main(["cka", "video_blocks", *flags]) == 0
    found = json.loads((tmp_path / "blocks.json").read_text())
    assert (found["clips"], found["side_px"]) == (5, 32)
    (panel,) = found["panels"]
    assert panel["rows"] == ["input", "block 1", "block 2", "query"]
    assert panel["columns"] == ["block 1", "block 2", "query"]
    values = np.array(panel["cka"])
    np.testing.assert_allclose([values[1, 0], values[2, 1], values[3, 2]], 1, atol=1e-9)
    assert values[0, 0] > 0.9  # a block adds little before any training


def test_a_clip_is_all_frames_of_the_backbone_too(config: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["cka", "--list", "--config-file", str(config), "--batch", "5"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["backbone[res5]"] == ["4x256x1x1", "clip"]
    assert lines["head.blocks.0"] == ["1x4x1x32", "clip"]
