"""Settings that cannot work are named before data is read and a model is built."""

from __future__ import annotations

from pathlib import Path

import pytest

import d2_frozen
from d2_frozen.engine.settings import check_output_dir, check_settings
from detectron2.config import CfgNode, get_cfg


def config(folder: Path, *pairs: object) -> CfgNode:
    cfg = d2_frozen.add_frozen_config(get_cfg())
    cfg.merge_from_list(["OUTPUT_DIR", str(folder / "out"), "DATASETS.TRAIN", ("parts",), *pairs])
    return cfg


def test_good_settings_make_the_folder(tmp_path: Path) -> None:
    check_settings(config(tmp_path), train=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "SOLVER.MAX_ITER",
            0,
            r"SOLVER.MAX_ITER is 0; it must be at least 1 \(to evaluate only, use --eval-only",
        ),
        ("SOLVER.MAX_ITER", -1, "SOLVER.MAX_ITER is -1"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD is 0; it must be at least 1"),
        ("SOLVER.IMS_PER_BATCH", 0, "SOLVER.IMS_PER_BATCH is 0"),
        ("SOLVER.STEPS", (20, 10), r"SOLVER.STEPS is \(20, 10\); .* must increase"),
        ("SOLVER.STEPS", (10, 10), r"SOLVER.STEPS is \(10, 10\)"),
        ("DATALOADER.NUM_WORKERS", -1, "DATALOADER.NUM_WORKERS is -1; it must be at least 0"),
        ("SEED", 2**32, "SEED is 4294967296; it must be at most 4294967295"),
        ("DATASETS.TRAIN", (), "DATASETS.TRAIN is empty"),
        ("OUTPUT_DIR", "", "OUTPUT_DIR is empty"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(config(tmp_path, key, value), train=True)


def test_as_many_steps_as_iterations(tmp_path: Path) -> None:
    """fvcore's scheduler says something of num_updates, and no key."""
    with pytest.raises(ValueError, match=r"SOLVER.STEPS is \(1, 2\): as many steps as SOLVER.MAX_ITER 2 has"):
        check_settings(config(tmp_path, "SOLVER.STEPS", (1, 2), "SOLVER.MAX_ITER", 2), train=True)
    check_settings(config(tmp_path, "SOLVER.STEPS", (1, 3), "SOLVER.MAX_ITER", 2), train=True)


def test_evaluation_needs_a_test_set_and_no_training(tmp_path: Path) -> None:
    untrained = ("DATASETS.TRAIN", (), "SOLVER.MAX_ITER", 0)
    with pytest.raises(ValueError, match="DATASETS.TEST is empty: there is nothing to evaluate on"):
        check_settings(config(tmp_path, *untrained), train=False)
    check_settings(config(tmp_path, *untrained, "DATASETS.TEST", ("parts_val",)), train=False)


def test_output_that_cannot_be_written_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match="OUTPUT_DIR cannot be written to: .*Give another folder: '.*/file/out'"
    ):
        check_output_dir(str(tmp_path / "file/out"))


def test_a_log_of_another_user_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that ran as root leaves such."""
    (tmp_path / "log.txt").touch()
    check_output_dir(str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("log.txt"))
    with pytest.raises(PermissionError, match="a file of another user.*Change its owner.*log.txt"):
        check_output_dir(str(tmp_path))
