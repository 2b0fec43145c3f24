"""Segmentation from a feature cache: the same losses and weights, without reading images."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2_frozen.train_net import setup
from seg_app.trainer import SegmentationTrainer

Flags = Callable[..., Namespace]


def train(args: Namespace) -> SegmentationTrainer:
    trainer = SegmentationTrainer(setup(args))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def results(folder: Path) -> tuple[list, dict[str, torch.Tensor]]:
    """Losses of all iterations, all digits, and the weights."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    losses = [{key: value for key, value in line.items() if "loss" in key} for line in lines]
    return losses, torch.load(folder / "model_final.pth", weights_only=True)["model"]


@pytest.mark.parametrize("crop", ["[48, 48]", "[64, 40]"])
def test_cached_training_equals_live_training_bit_for_bit(
    crop: str, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 images, 2 views with colour jitter, batches of 2. Images that are smaller than the crop are padded."""
    common = (
        "MODEL.FROZEN.CACHE.VIEWS",
        "2",
        "SOLVER.MAX_ITER",
        "9",
        "DATASETS.TEST",
        "()",
        "INPUT.CROP.SIZE",
        crop,
    )
    cached = ("MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"))
    train(flags(*common, "OUTPUT_DIR", str(tmp_path / "live")))
    filling = train(flags(*common, *cached, "OUTPUT_DIR", str(tmp_path / "filling")))
    assert filling.feature_cache.statistics.written == 16

    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("no image needs to be read")

    monkeypatch.setattr("seg_app.data.mapper.SegmentationMapper._image", must_not_run)
    reading = train(flags(*common, *cached, "OUTPUT_DIR", str(tmp_path / "reading")))
    assert reading.feature_cache.statistics.hit_rate() == 1
    losses, weights = results(tmp_path / "live")
    for name in ("filling", "reading"):
        other_losses, other_weights = results(tmp_path / name)
        assert losses == other_losses
        assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
