"""train_net with a segmentation config: what must hold of a run, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import (
    SEGMENTATION,
    Flags,
    Part,
    assert_resumed_equals_uninterrupted,
    flags_for,
    sem_seg_entries,
    trained_on,
    weights,
    write_config,
)

from d2_frozen import tasks
from d2_frozen.train_net import main, setup
from seg_app.trainer import SegmentationTrainer

ROOT = Path(__file__).resolve().parents[2]


def test_run_resume_and_evaluation(flags: Flags, tmp_path: Path) -> None:
    """Only the head is in the checkpoint; stopped and resumed equals uninterrupted; the files are there."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = main(flags("OUTPUT_DIR", str(whole)))
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    metrics = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    assert "sem_seg/mIoU" in metrics[-1]
    assert len(list((whole / "inference/predictions/tiny_seg_val").glob("*.png"))) == 3
    for file in ("confusion_tiny_seg_val.png", "predictions_tiny_seg_val.jpg"):
        assert (whole / "inference" / file).stat().st_size > 0
    assert {key.split(".")[0] for key in weights(whole)} == {"sem_seg_head", "criterion"}

    assert_resumed_equals_uninterrupted(whole, flags, parts)

    again = main(
        flags("--eval-only", "OUTPUT_DIR", str(whole), "MODEL.WEIGHTS", str(whole / "model_final.pth"))
    )
    assert np.allclose(again["sem_seg"]["mIoU"], results["sem_seg"]["mIoU"])


def test_test_time_augmentation_and_windows(flags: Flags) -> None:
    results = main(
        flags(
            *("SOLVER.MAX_ITER", "1", "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(32, 48)"),
            *("TEST.SLIDING_WINDOW.SIZE", "40", "TEST.PICTURES", "0"),
        )
    )
    assert results.keys() == {"sem_seg", "sem_seg_TTA"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["TEST.SLIDING_WINDOW.OVERLAP", "1.5"], "TEST.SLIDING_WINDOW: SIZE 0, OVERLAP 1.5"),
        (["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "()"], "TEST.AUG.MIN_SIZES is empty"),
        (["MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "False"], "MASK_FORMER.TEST.SEMANTIC_ON is False"),
    ],
)
def test_settings_of_testing_are_looked_at_before_training(
    flags: Flags, options: list[str], message: str
) -> None:
    cfg = setup(flags(*options))
    with pytest.raises(ValueError, match=message):
        SegmentationTrainer(cfg)


def test_results_of_several_test_sets_do_not_replace_each_other(flags: Flags, tmp_path: Path) -> None:
    names = ["tiny_seg_val", "tiny_seg_train"]
    cfg = setup(flags("DATASETS.TEST", str(tuple(names))))
    folders = [SegmentationTrainer.build_evaluator(cfg, name)._output_dir for name in names]
    assert folders == [f"{tmp_path}/out/inference/{name}" for name in names]


def test_classes_that_the_test_data_does_not_name_are_told_before_training(
    tiny_world: Path, tmp_path: Path
) -> None:
    """Those of the training data stand beside its label maps. The first evaluation would end the run."""
    train, val = sem_seg_entries(tiny_world, "half_named")
    shutil.copytree(val["labels"], tmp_path / "ids" / "val")
    entries: list[Part] = [train, {**val, "labels": f"{tmp_path}/ids/val"}]
    output: Part = {"OUTPUT_DIR": f"{tmp_path}/out"}
    path = write_config(tmp_path / "half.yaml", SEGMENTATION, trained_on(entries, iterations=1), output)
    cfg = setup(flags_for(path)())
    with pytest.raises(ValueError, match="half_named_val of DATASETS.TEST does not name its classes"):
        SegmentationTrainer(cfg)


@pytest.mark.parametrize("head", ["LinearSegHead", "UPerNetHead"])
def test_baseline_heads_train(head: str, flags: Flags) -> None:
    norm = "LN" if head == "LinearSegHead" else "GN"
    options = ["MODEL.SEM_SEG_HEAD.NAME", head, "MODEL.SEM_SEG_HEAD.NORM", norm, "SOLVER.MAX_ITER", "1"]
    options += ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "64"]
    assert main(flags(*options, "TEST.PICTURES", "0"))["sem_seg"]["pACC"] >= 0


def test_the_meta_architecture_says_the_task(tiny_config: Path) -> None:
    assert tasks.task_of(tasks.read_config(tiny_config)).name == "semantic segmentation"
    assert tasks.task_of(tasks.read_config("")).name == "detection"
    with_option = tasks.read_config("", ["MODEL.META_ARCHITECTURE", "FrozenSegmentor"])
    assert "MASK_FORMER" in with_option.MODEL


def test_python_m_seg_app() -> None:
    command = [sys.executable, "-m", "seg_app", "--config-file", "configs/quickstart/detection.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "is a config of detection" in done.stderr
