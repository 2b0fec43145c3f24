"""Metrics against an independent computation; what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2_frozen import tasks
from d2_frozen.data import register_from_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from seg_app.evaluation import LabelMapEvaluator
from seg_app.evaluation.evaluator import class_table

K, IGNORED = 5, 200
NAMES = ["a", "b", "c", "never", "e"]


@pytest.fixture
def random_maps(label_folders):
    """Six random maps in which class 3 never is, and some pixels are ignored; a dataset of them."""
    rng = np.random.RandomState(0)
    truth = {f"x/{i}": rng.choice([0, 1, 2, 4, IGNORED], (9, 11 + i)).astype(np.uint8) for i in range(6)}
    images, labels = label_folders(truth)
    records = [
        {"file_name": str(images / f"{name}.png"), "sem_seg_file_name": str(labels / f"{name}.png")}
        for name in truth
    ]
    DatasetCatalog.register("random_maps", lambda: records)
    MetadataCatalog.get("random_maps").set(
        stuff_classes=NAMES, ignore_label=IGNORED, evaluator_type="sem_seg"
    )
    predicted = [rng.randint(0, K, t.shape) for t in truth.values()]
    yield records, list(truth.values()), predicted
    DatasetCatalog.remove("random_maps")
    MetadataCatalog.remove("random_maps")


def scores_of(labels: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(labels), K).permute(2, 0, 1).float()


def evaluated(records, predicted, folder: Path) -> dict:
    evaluator = LabelMapEvaluator("random_maps", str(folder))
    evaluator.reset()
    for record, labels in zip(records, predicted):
        evaluator.process([record], [{"sem_seg": scores_of(labels)}])
    return evaluator.evaluate()["sem_seg"]


def test_metrics_equal_an_independent_computation(random_maps, tmp_path: Path) -> None:
    records, truth, predicted = random_maps
    got = evaluated(records, predicted, tmp_path / "out")
    t = np.concatenate([x.ravel() for x in truth])
    p = np.concatenate([x.ravel() for x in predicted])
    t, p = t[t != IGNORED], p[t != IGNORED]
    present = [k for k in range(K) if (t == k).any()]
    iou = {k: ((t == k) & (p == k)).sum() / ((t == k) | (p == k)).sum() for k in present}
    assert present == [0, 1, 2, 4]
    assert got["mIoU"] == pytest.approx(100 * np.mean(list(iou.values())))
    assert got["fwIoU"] == pytest.approx(100 * sum(iou[k] * (t == k).mean() for k in present))
    assert got["pACC"] == pytest.approx(100 * (t == p).mean())
    assert got["mACC"] == pytest.approx(100 * np.mean([(p[t == k] == k).mean() for k in present]))
    assert got["IoU-b"] == pytest.approx(100 * iou[1]) and math.isnan(got["IoU-never"])


def test_predictions_are_written_as_label_maps(random_maps, tmp_path: Path) -> None:
    records, _, predicted = random_maps
    evaluated(records, predicted, tmp_path / "out")
    files = sorted((tmp_path / "out/predictions/random_maps").rglob("*.png"))
    assert len(files) == 6
    for file, labels in zip(files, predicted):
        with Image.open(file) as image:
            assert image.mode == "L" and (np.array(image) == labels).all()
    with Image.open(tmp_path / "out/confusion_random_maps.png") as image:
        assert min(image.size) > 100


def test_more_than_255_classes_and_an_image_of_ignored_pixels(label_folders, tmp_path: Path) -> None:
    """Ids above 255 come back from 16-bit files; an image without labels changes nothing; 1 of 3 is wrong."""
    truth = {"a": np.uint16([[0, 299], [256, 65535]]), "b": np.full((2, 3), 65535, np.uint16)}
    images, labels = label_folders(truth)
    records = [
        {"file_name": str(images / f"{name}.png"), "sem_seg_file_name": str(labels / f"{name}.png")}
        for name in truth
    ]
    DatasetCatalog.register("many_classes", lambda: records)
    MetadataCatalog.get("many_classes").set(
        stuff_classes=[f"c{k}" for k in range(300)], ignore_label=65535, evaluator_type="sem_seg"
    )
    try:
        evaluator = LabelMapEvaluator("many_classes", str(tmp_path / "out"))
        evaluator.reset()
        predicted = np.array([[0, 299], [255, 7]])
        for record, found in zip(records, (predicted, np.zeros((2, 3), int))):
            scores = torch.nn.functional.one_hot(torch.from_numpy(found), 300).permute(2, 0, 1)
            evaluator.process([record], [{"sem_seg": scores}])
        got = evaluator.evaluate()["sem_seg"]
    finally:
        DatasetCatalog.remove("many_classes")
        MetadataCatalog.remove("many_classes")
    assert got["pACC"] == pytest.approx(100 * 2 / 3) and got["mIoU"] == pytest.approx(100 * 2 / 3)
    with Image.open(tmp_path / "out/predictions/many_classes/a.png") as image:
        assert np.array(image).tolist() == predicted.tolist()


def test_files_hold_the_datas_own_numbers(label_folders, tmp_path: Path) -> None:
    """Classes 0 and 1 stand in the label maps as 7 and 26: in the PNG and in Detectron2's json alike."""
    images, labels = label_folders({"a": np.uint8([[7, 26, 0]])})
    entry = {"name": "own_numbers", "type": "sem_seg", "images": str(images), "labels": str(labels)}
    cfg = tasks.read_config("", ["MODEL.META_ARCHITECTURE", "FrozenSegmentor"])
    cfg.DATASETS.REGISTER = [{**entry, "classes": ["road", "car"], "label_values": [7, 26]}]
    register_from_config(cfg)
    try:
        evaluator = LabelMapEvaluator("own_numbers", str(tmp_path / "out"))
        evaluator.reset()
        scores = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]])
        evaluator.process(DatasetCatalog.get("own_numbers"), [{"sem_seg": scores}])
        assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100
    finally:
        DatasetCatalog.remove("own_numbers")
        MetadataCatalog.remove("own_numbers")
    with Image.open(tmp_path / "out/predictions/own_numbers/a.png") as image:
        assert np.array(image).tolist() == [[7, 26, 26]]
    rows = json.loads((tmp_path / "out/sem_seg_predictions.json").read_text())
    assert [row["category_id"] for row in rows] == [7, 26]


def test_the_table_says_what_is_absent_and_what_is_mistaken() -> None:
    counts = np.array([[80, 20, 0], [10, 90, 0], [0, 0, 0]])
    lines = [line.split() for line in class_table(["cat", "dog", "fish"], counts).splitlines()[2:]]
    assert lines[0] == ["cat", "72.73", "80.00", "50.00", "dog", "20.0", "%"]
    assert lines[1] == ["dog", "75.00", "90.00", "50.00", "cat", "10.0", "%"]
    assert " ".join(lines[2]) == "fish - - 0 not in this dataset"


def test_a_dataset_of_your_own_needs_class_names_only(label_folders, tmp_path: Path) -> None:
    truth = np.array([[0, 1, 1], [0, 0, 255]], np.uint8)
    images, labels = label_folders({"a": truth})
    record = {"file_name": str(images / "a.png"), "sem_seg_file_name": str(labels / "a.png")}
    DatasetCatalog.register("own_maps_of_test_evaluator", lambda: [record])
    MetadataCatalog.get("own_maps_of_test_evaluator").stuff_classes = NAMES
    evaluator = LabelMapEvaluator("own_maps_of_test_evaluator")
    evaluator.reset()
    evaluator.process([record], [{"sem_seg": scores_of(np.array([[0, 1, 1], [0, 0, 2]]))}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100
