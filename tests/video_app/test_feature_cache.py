"""Video training from a feature cache: the same losses and weights, without decoding; the last stage only."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2_frozen.caching import spaces_in
from d2_frozen.train_net import argument_parser, setup
from video_app.moving_shapes import generate
from video_app.trainer import VideoTrainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 videos of 20 frames."""
    folder = tmp_path_factory.mktemp("clips")
    generate(folder, train=6, val=1, seed=1, size_px=48, frames=20)
    return folder


@pytest.fixture
def flags(clips: Path, tmp_path: Path) -> Callable[..., Namespace]:
    text = f"""
_BASE_: {ROOT / "configs/Base-Frozen-Video.yaml"}
MODEL:
  DEVICE: cpu
  TIMM: {{NAME: swinv2_pico_window8_256, PRETRAINED: "", ARGS: {{}}}}
  VIDEO_HEAD: {{NAME: GlobalVideoHead, NUM_CLASSES: -1, NUM_BLOCKS: 1, FRAMES_PER_PASS: 3}}
  FROZEN: {{CACHE: {{VIEWS: 2}}}}
DATASETS:
  REGISTER:
    - {{name: cached_clips, type: video_list, list: {clips}/train.txt, root: {clips}}}
  TRAIN: [cached_clips]
  TEST: []
VIDEO: {{NUM_FRAMES: 4, STRIDE: 2, CROP_SIZE: 32, SHORT_SIDE: 40}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 7, CHECKPOINT_PERIOD: 100}}
DATALOADER: {{NUM_WORKERS: 0}}
OUTPUT_DIR: {tmp_path}/out
SEED: 7
"""
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return lambda *options: argument_parser().parse_args(["--config-file", str(path), *options])


def train(args: Namespace) -> VideoTrainer:
    trainer = VideoTrainer(setup(args))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def results(folder: Path) -> tuple[list, dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in lines]
    return losses, torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_cached_training_equals_live_training_bit_for_bit(
    flags: Callable[..., Namespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 videos, 2 views, batches of 2; 4 frames of a clip go through the backbone 3 at a time."""
    cached = ("MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"))
    train(flags("OUTPUT_DIR", str(tmp_path / "live")))
    filling = train(flags(*cached, "OUTPUT_DIR", str(tmp_path / "filling")))
    assert filling.feature_cache.statistics.written == 12
    (space,) = spaces_in(tmp_path / "cache")
    assert space.facts["maps"] == ["res5"]

    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("no video needs to be read")

    monkeypatch.setattr("video_app.clips.decoder.ClipDecoder.read", must_not_run)
    reading = train(flags(*cached, "OUTPUT_DIR", str(tmp_path / "reading")))
    assert reading.feature_cache.statistics.hit_rate() == 1
    losses, weights = results(tmp_path / "live")
    for name in ("filling", "reading"):
        other_losses, other_weights = results(tmp_path / name)
        assert losses == other_losses
        assert all(torch.equal(weights[key], other_weights[key]) for key in weights)


def test_build(flags: Callable[..., Namespace], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from d2_frozen import cache

    cached = ["MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache")]
    config = flags().config_file
    assert cache.main(["build", "--config-file", config, *cached]) == 0
    assert "12 entries written" in capsys.readouterr().out
    trained = train(flags(*cached, "SOLVER.MAX_ITER", "2"))
    assert trained.feature_cache.statistics.hits == 4
