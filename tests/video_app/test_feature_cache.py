"""Video training from a feature cache: the same losses and weights, without decoding; the last stage only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_runs import (
    VIDEO,
    Flags,
    assert_same_weights,
    flags_for,
    losses,
    train,
    trained_on,
    video_entries,
    write_config,
)

from d2_frozen.caching import spaces_in
from video_app.clips.bad_clips import read_bad_clips
from video_app.moving_shapes import generate


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 videos of 20 frames."""
    folder = tmp_path_factory.mktemp("clips")
    generate(folder, train=6, val=1, seed=1, size_px=48, frames=20)
    return folder


@pytest.fixture
def tiny_config(clips: Path, tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "tiny.yaml",
        VIDEO,
        trained_on(video_entries(clips, "cached_clips", parts=("train",)), iterations=7),
        {
            "MODEL": {
                "VIDEO_HEAD": {"NAME": "GlobalVideoHead", "NUM_BLOCKS": 1, "FRAMES_PER_PASS": 3},
                "FROZEN": {"CACHE": {"VIEWS": 2}},
            },
            "OUTPUT_DIR": f"{tmp_path}/out",
        },
    )


def test_cached_training_equals_live_training_bit_for_bit(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    for name in ("filling", "reading"):
        assert losses(tmp_path / "live") == losses(tmp_path / name)
        assert_same_weights(tmp_path / "live", tmp_path / name)


def test_a_file_that_is_gone_ends_no_cached_run(clips: Path, tiny_config: Path, tmp_path: Path) -> None:
    """Another takes its place, as without a cache, and it is noted."""
    lines = (clips / "train.txt").read_text().splitlines()
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join([*lines[:3], "gone.mp4 0"]))
    shutil.copy(clips / "classes.txt", folder)
    entry = {"name": "with_gone", "type": "video_list", "list": str(folder / "train.txt"), "root": str(clips)}
    config = write_config(
        tmp_path / "gone.yaml",
        {"_BASE_": str(tiny_config)},
        {"DATASETS": {"REGISTER": [entry], "TRAIN": ["with_gone"]}, "SOLVER": {"MAX_ITER": 4}},
        {"MODEL": {"FROZEN": {"CACHE": {"DIR": str(tmp_path / "cache")}}}},
    )
    train(flags_for(config)())
    (noted,) = read_bad_clips(tmp_path / "out/bad_clips.txt")
    assert noted == str(clips / "gone.mp4")


def test_build(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from d2_frozen import cache

    cached = ["MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache")]
    config = flags().config_file
    assert cache.main(["build", "--config-file", config, *cached]) == 0
    assert "12 entries written" in capsys.readouterr().out
    trained = train(flags(*cached, "SOLVER.MAX_ITER", "2"))
    assert trained.feature_cache.statistics.hits == 4
