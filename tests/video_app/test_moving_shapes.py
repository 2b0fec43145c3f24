"""The generated clips: what tells a pair of classes apart is order, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from video_app.clips.reader import open_clip
from video_app.moving_shapes import generate, main
from video_app.moving_shapes_render import _SCENES, CLASSES, render


@pytest.mark.parametrize("pair", range(len(CLASSES) // 2))
def test_the_second_of_a_pair_is_the_first_in_reverse(pair: int) -> None:
    """From equal draws: so both have the same frames, and an order-blind model cannot tell which is which."""
    forwards, backwards = (render(2 * pair + k, np.random.default_rng(5), 48, 16) for k in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards[::-1]))
    assert not all(np.array_equal(a, b) for a, b in zip(forwards, backwards))


def test_names_say_what_is_seen() -> None:
    """States are (x, y, clockwise angle, scale, inversion); y points down."""
    left, up, turn, hurry, events = (
        np.array([scene(t) for t in np.linspace(0, 1, 101)])
        for scene in (build(np.random.default_rng(1)) for build in _SCENES)
    )
    assert (np.diff(left[:, 0]) < 0).all() and np.ptp(left[:, 1]) == 0
    assert (np.diff(up[:, 1]) < 0).all() and np.ptp(up[:, 0]) == 0
    assert (np.diff(turn[:, 2]) > 0).all() and np.ptp(turn[:, :2], axis=0).max() == 0
    assert (np.diff(np.abs(np.diff(hurry[:, 0]))) > 0).all()
    assert np.argmax(events[:, 3]) < 50 < np.argmax(events[:, 4])


def test_a_single_place_says_nothing_about_the_kind_of_motion() -> None:
    """Shapes at rest and moving ones cover the same middle of the picture."""
    for build in _SCENES:
        places = np.array([build(np.random.default_rng(seed))(0.5)[:2] for seed in range(300)])
        assert np.abs(places.mean(0) - 0.5).max() < 0.05 and places.min() > 0.2 and places.max() < 0.8


def test_files_are_what_was_drawn_and_equal_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert generate(tmp_path / name, train=10, val=10, seed=3, size_px=64, frames=20)
    lines = (tmp_path / "a/train.txt").read_text().splitlines()
    assert Counter(line.split()[1] for line in lines) == {str(k): 1 for k in range(10)}
    assert (tmp_path / "a/classes.txt").read_text().split() == list(CLASSES)
    for path in sorted((tmp_path / "a").rglob("*.mp4")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    with open_clip(str(tmp_path / "a/train/000004.mp4"), "pyav") as clip:
        drawn = np.stack(render(4, np.random.default_rng([3, 0, 4]), 64, 20))
        assert np.abs(clip.read(range(20)).astype(int) - drawn).mean() < 12
        assert (len(clip), clip.fps) == (20, 16)


def test_an_interrupted_or_other_set_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "set"
    command = ["--output", str(root), "--train", "3", "--val", "1", "--size", "32", "--frames", "16"]
    main(command)
    assert "written" in capsys.readouterr().out
    main(command)
    assert "already complete" in capsys.readouterr().out
    (root / "train/000001.mp4").unlink()
    assert generate(root, 3, 1, size_px=32, frames=16)
    assert generate(root, 2, 1, size_px=32, frames=16)
    assert sorted(path.name for path in (root / "train").iterdir()) == ["000000.mp4", "000001.mp4"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    with pytest.raises(FileExistsError):
        generate(tmp_path / "other", 1, 1)
