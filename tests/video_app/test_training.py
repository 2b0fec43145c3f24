"""train_net with a video config: what must hold of a run, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import Flags, assert_resumed_equals_uninterrupted, weights

from d2_frozen import tasks
from d2_frozen.data.problems import BadDataError
from d2_frozen.train_net import main, setup
from detectron2.data import DatasetCatalog
from video_app.data import load_video_list
from video_app.trainer import VideoTrainer

ROOT = Path(__file__).resolve().parents[2]


def test_run_resume_and_evaluation(flags: Flags, tmp_path: Path) -> None:
    """Only the head is in the checkpoint; stopped and resumed equals uninterrupted; the files are there."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = main(flags("OUTPUT_DIR", str(whole)))
    assert 0 <= results["video"]["top1"] <= results["video"]["top5"] <= 100
    metrics = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    assert "video/top1" in metrics[-1]
    for file in ("predictions_tiny_video_val.jpg", "predictions_tiny_video_val.jsonl"):
        assert (whole / "inference" / file).stat().st_size > 0
    assert {key.split(".")[0] for key in weights(whole)} == {"head"}

    assert_resumed_equals_uninterrupted(whole, flags, parts)

    again = main(
        flags("--eval-only", "OUTPUT_DIR", str(whole), "MODEL.WEIGHTS", str(whole / "model_final.pth"))
    )
    assert np.allclose(again["video"]["top1"], results["video"]["top1"])


def test_a_broken_video_is_replaced_and_counted(flags: Flags, tiny_clips: Path, tmp_path: Path) -> None:
    """A file that is no video: training goes on, testing counts it as wrong, the list of bad clips has it."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for split in ("train", "val"):
        lines = (tiny_clips / f"{split}.txt").read_text().splitlines()[:2]
        listed = [f"{tiny_clips}/{line}" for line in lines] + [f"{tmp_path}/broken.mp4 1"]
        (tmp_path / f"{split}.txt").write_text("\n".join(listed) + "\n")
    entries = [
        {"name": f"broken_{split}", "type": "video_list", "list": f"{tmp_path}/{split}.txt"}
        for split in ("train", "val")
    ]
    options = ["DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('broken_train',)"]
    results = main(flags(*options, "DATASETS.TEST", "('broken_val',)"))
    assert results["video"]["bad"] == 1
    assert "broken.mp4" in (tmp_path / "out/bad_clips.txt").read_text()


def test_class_counts_come_from_the_data_or_are_checked(flags: Flags, tmp_path: Path) -> None:
    assert setup(flags()).MODEL.VIDEO_HEAD.NUM_CLASSES == 10
    with pytest.raises(ValueError, match="NUM_CLASSES is 7, but dataset tiny_video_train has 10 classes"):
        setup(flags("MODEL.VIDEO_HEAD.NUM_CLASSES", "7"))


def test_data_of_ones_own_that_does_not_name_its_classes(
    flags: Flags, tiny_clips: Path, tmp_path: Path
) -> None:
    """The config has their number: they are called by number, in checkpoints and in the evaluation."""
    records = [{**one, "label": k % 2} for k, one in enumerate(load_video_list(f"{tiny_clips}/val.txt"))]
    for split in ("train", "val"):
        DatasetCatalog.register(f"nameless_{split}", lambda: records)
    try:
        names = ("DATASETS.TRAIN", "('nameless_train',)", "DATASETS.TEST", "('nameless_val',)")
        results = main(flags(*names, "MODEL.VIDEO_HEAD.NUM_CLASSES", "2", "SOLVER.MAX_ITER", "2"))
    finally:
        for split in ("train", "val"):
            DatasetCatalog.remove(f"nameless_{split}")
    assert results["video"]["bad"] == 0
    saved = torch.load(tmp_path / "out/model_final.pth", weights_only=True)
    assert saved["classes"] == ["0", "1"]


def test_datasets_must_agree_on_their_classes(flags: Flags, tiny_clips: Path) -> None:
    """A list without names, whose labels are a part of the others', fits; one with other names does not."""
    base = {"type": "video_list", "root": str(tiny_clips)}
    train = {**base, "name": "agree_train", "list": f"{tiny_clips}/train.txt"}
    numbered = {**base, "list": f"{tiny_clips}/val.txt", "classes": [str(k) for k in range(10)]}
    named = {**base, "list": f"{tiny_clips}/val.txt", "classes": [f"class {k}" for k in range(10)]}

    def prepared(entry: dict) -> int:
        entries = str([train, entry])
        options = ["DATASETS.REGISTER", entries, "DATASETS.TRAIN", "('agree_train',)"]
        return setup(flags(*options, "DATASETS.TEST", f"('{entry['name']}',)")).MODEL.VIDEO_HEAD.NUM_CLASSES

    assert prepared({**numbered, "name": "agree_numbered"}) == 10
    with pytest.raises(BadDataError, match="differ in their classes"):
        prepared({**named, "name": "agree_named"})


@pytest.mark.parametrize(
    "options, message",
    [
        (["TEST.AUG.ENABLED", "True"], "VIDEO.TEST.CLIPS"),
        (["INPUT.RANDOM_FLIP", "none"], r"^INPUT\.RANDOM_FLIP: .*VIDEO\..*FLIP"),
        (["INPUT.CROP.ENABLED", "True", "INPUT.FORMAT", "BGR"], r"^INPUT\.CROP\.ENABLED: .*TRAIN_CROP"),
        (["DATALOADER.ASPECT_RATIO_GROUPING", "True"], "ASPECT_RATIO_GROUPING"),
        (["MODEL.VIDEO_HEAD.SWEEP.SAVE", "some"], "SWEEP.SAVE"),
    ],
)
def test_settings_that_cannot_be_are_named_before_training(
    flags: Flags, options: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        setup(flags(*options))


@pytest.mark.parametrize("key", ["CLIPS", "CROPS"])
def test_settings_of_testing_are_looked_at_before_training(flags: Flags, key: str) -> None:
    cfg = setup(flags(f"VIDEO.TEST.{key}", "0"))
    with pytest.raises(ValueError, match=f"TEST.{key}"):
        VideoTrainer(cfg)


def test_the_meta_architecture_says_the_task(tiny_config: Path) -> None:
    assert tasks.task_of(tasks.read_config(tiny_config)).name == "action recognition"


def test_python_m_video_app() -> None:
    command = [sys.executable, "-m", "video_app", "--config-file", "configs/quickstart/detection.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "is a config of detection" in done.stderr
    assert "none of FrozenVideoClassifier, FrozenVideoSweep" in done.stderr
