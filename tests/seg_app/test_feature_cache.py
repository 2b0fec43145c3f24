"""Segmentation from a feature cache: the same losses and weights, without reading images."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import Flags, assert_same_weights, losses, train


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
    for name in ("filling", "reading"):
        assert losses(tmp_path / "live") == losses(tmp_path / name)
        assert_same_weights(tmp_path / "live", tmp_path / name)
