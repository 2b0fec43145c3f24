"""Pictures and numbers of the data of each task, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import (
    DETECTION,
    SEGMENTATION,
    VIDEO,
    Part,
    coco_entries,
    sem_seg_entries,
    trained_on,
    video_entries,
    write_config,
)

from d2_frozen import visualize_data
from d2_frozen.data.shapes import generate
from video_app import moving_shapes


@pytest.fixture
def view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command for a config, with output in tmp_path/out; what it prints."""

    def run(*parts: Part, options: tuple[str, ...] = ()) -> str:
        path = write_config(tmp_path / "view.yaml", *parts, {"OUTPUT_DIR": f"{tmp_path}/out"})
        visualize_data.main(["--config-file", str(path), "--pictures", "3", "--samples", "4", *options])
        told = capsys.readouterr().out
        assert (tmp_path / "out/data/facts.txt").read_text() in told
        return told

    return run


def sheets(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.jpg"))}


def test_boxes_and_masks(tmp_path: Path, view: Callable[..., str]) -> None:
    generate(tmp_path, train=6, val=3, seed=1, size=64)
    labels = json.loads((tmp_path / "train.json").read_text())
    told = view(DETECTION, trained_on(coco_entries(tmp_path, "vis"), iterations=1))
    assert f"vis_train: 6 images, 0 of them without objects; {len(labels['annotations'])} objects" in told
    for category in labels["categories"]:
        own = [one for one in labels["annotations"] if one["category_id"] == category["id"]]
        line = next(line for line in told.splitlines() if line.startswith(f"{category['name']} "))
        assert line.split()[1:] == [str(len(own)), str(len({one["image_id"] for one in own}))]
    assert "4 training samples" in told and "anchors of 16, 32, 64, 96, 144 px" in told
    found = sheets(tmp_path / "out/data")
    assert list(found) == ["labelled_vis_train.jpg", "labelled_vis_val.jpg", "training.jpg"]
    # Three square crops of 320 px side by side, with margins of 8 and a line of text.
    assert found["training.jpg"].shape == (320 + 22 + 16, 3 * (320 + 16), 3)
    sizes = [
        (one["width"], one["height"]) for one in json.loads((tmp_path / "val.json").read_text())["images"]
    ]
    width = sum(round(320 * width / height) + 16 for width, height in sizes)
    assert found["labelled_vis_val.jpg"].shape == (320 + 22 + 16, width, 3)


def test_label_maps(tmp_path: Path, view: Callable[..., str]) -> None:
    """The whole picture is one crop here: the share of a class is that in the label map."""
    generate(tmp_path, train=1, val=1, seed=1, size=64)
    entries = sem_seg_entries(tmp_path, "vis_seg")
    labels = np.asarray(Image.open(next((tmp_path / "labels/train").iterdir())))
    plain: Part = {"INPUT": {"MIN_SIZE_TRAIN": [min(labels.shape)], "CROP": {"ENABLED": False}}}
    told = view(SEGMENTATION, trained_on(entries, iterations=1), plain)
    shares = np.bincount(labels.ravel(), minlength=7) / labels.size
    first = next(line for line in told.splitlines() if line.startswith("background "))
    assert first.split()[1:] == [f"{shares[0]:.2%}", "4"]
    assert "0.0% of their pixels are ignored" in told
    assert list(sheets(tmp_path / "out/data")) == [
        "labelled_vis_seg_train.jpg",
        "labelled_vis_seg_val.jpg",
        "training.jpg",
    ]


def test_label_maps_of_classes_without_names(tmp_path: Path, view: Callable[..., str]) -> None:
    generate(tmp_path, train=1, val=1, seed=1, size=64)
    (tmp_path / "labels/classes.txt").unlink()
    training = trained_on(sem_seg_entries(tmp_path, "vis_nameless"), iterations=1)
    told = view(SEGMENTATION, training, options=("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"))
    assert "vis_nameless_val: 1 images, 7 classes" in told


def test_clips(tmp_path: Path, view: Callable[..., str]) -> None:
    moving_shapes.generate(tmp_path, train=4, val=2, seed=1, size_px=48, frames=16)
    told = view(VIDEO, trained_on(video_entries(tmp_path, "vis_video"), iterations=1))
    assert "vis_video_train: 4 videos" in told
    # 4 frames, a stride of 2.
    assert "4 training samples of 4 frames, 32 px; from the first to the last it is 6 to 6 frames" in told
    strips = sheets(tmp_path / "out/data")["training.jpg"]
    assert strips.shape == (40 + 96 + 16, 3 * (6 * 96 + 16), 3)


def test_samples_are_those_that_training_begins_with(tmp_path: Path) -> None:
    generate(tmp_path, train=6, val=1, seed=1, size=64)
    path = write_config(
        tmp_path / "tiny.yaml", DETECTION, trained_on(coco_entries(tmp_path, "vis_first"), iterations=1)
    )
    cfg = visualize_data.read_config(path, [])
    visualize_data.tasks.task_of(cfg).prepare_datasets(cfg, train=True)
    trainer = visualize_data.tasks.task_of(cfg).trainer()
    shown = visualize_data._first_samples(cfg, 3)
    assert len(shown) == 4  # two batches
    loader = iter(trainer.build_train_loader(cfg, start_iteration=1))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(shown[2:], next(loader)))


def test_bad_data_is_told_as_in_a_training(tmp_path: Path, view: Callable[..., str]) -> None:
    generate(tmp_path, train=2, val=1, seed=1, size=64)
    next((tmp_path / "train").iterdir()).unlink()
    with pytest.raises(SystemExit, match="missing image"):
        view(DETECTION, trained_on(coco_entries(tmp_path, "vis_bad"), iterations=1))


def test_a_misspelt_dataset_is_told_without_quotes_around_it(
    tmp_path: Path, view: Callable[..., str]
) -> None:
    generate(tmp_path, train=2, val=1, seed=1, size=64)
    data = trained_on(coco_entries(tmp_path, "vis_spelt"), iterations=1)
    with pytest.raises(SystemExit, match="^error: [Dd]ataset 'vis_misspelt'"):
        view(DETECTION, data, options=("DATASETS.TRAIN", "('vis_misspelt',)"))
