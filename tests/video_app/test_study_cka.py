"""``study cka`` on video heads: an example is a clip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2_frozen.study.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(write_video: Callable[..., Path], tmp_path: Path) -> Path:
    """Five videos of different length, and one that is none."""
    names = [write_video(f"{count}.mp4", count=count, size=(48, 64)).name for count in (9, 13, 17, 21, 25)]
    name = f"five_of_{tmp_path.name}"
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    lines = [f"{name} {i % 2}" for i, name in enumerate([*names, "broken.mp4"])]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    path = tmp_path / "clips.yaml"
    path.write_text(f"""
_BASE_: {ROOT / "configs/Base-Frozen-Video.yaml"}
MODEL:
  DEVICE: cpu
  TIMM: {{NAME: swinv2_pico_window8_256, PRETRAINED: ""}}
  VIDEO_HEAD: {{NAME: AttentiveProbe, NUM_BLOCKS: 3, WIDTH: 32, NUM_HEADS: 2}}
VIDEO: {{NUM_FRAMES: 4, STRIDE: 1, SHORT_SIDE: 48, CROP_SIZE: 32, TEST: {{CLIPS: 2, CROPS: 3}}}}
DATASETS:
  REGISTER: [{{name: {name}, type: video_list, list: {tmp_path}/list.txt, root: {tmp_path}, classes: [a, b]}}]
  TRAIN: [{name}]
  TEST: [{name}]
DATALOADER: {{NUM_WORKERS: 0}}
OUTPUT_DIR: {tmp_path}/out
SEED: 1
""")
    return path


def test_blocks_and_pooling_query(config: Path, tmp_path: Path) -> None:
    flags = ["--config-file", str(config), "--batch", "6", "--output", str(tmp_path)]
    assert main(["cka", "video_blocks", *flags]) == 0
    found = json.loads((tmp_path / "video_blocks.json").read_text())
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
