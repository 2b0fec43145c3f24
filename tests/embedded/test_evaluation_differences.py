"""Where the embedded evaluators differ from the original on purpose: they say what is wrong."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import detectron2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator, inference_context
from detectron2.structures import Boxes, Instances

if not hasattr(detectron2, "EMBEDDED_IN"):
    pytest.skip("about the embedded engine", allow_module_level=True)

_spec = importlib.util.spec_from_file_location(
    "evaluation_facts", Path(__file__).parents[1] / "contract/test_evaluation.py"
)
facts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(facts)


def test_category_ids_are_mapped_back_though_nobody_read_the_dataset(tmp_path: Path):
    name = facts.registered(tmp_path, read=False)
    results = facts.evaluated(name, {i: facts.perfect(i) for i in facts.TRUTH})
    assert results["bbox"]["AP-bolt"] == pytest.approx(100.0)


def test_annotation_id_0_is_no_miss(tmp_path: Path):
    """COCO's matching takes the id 0 for "unmatched"."""
    content = facts.coco_content()
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    results = facts.evaluated(facts.registered(tmp_path, content), {i: facts.perfect(i) for i in facts.TRUTH})
    assert results["bbox"]["AP"] == pytest.approx(100.0)


def test_iscrowd_and_area_may_be_missing(tmp_path: Path):
    content = facts.coco_content()
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    outputs = {i: facts.perfect(i, masks=True) for i in facts.TRUTH}
    results = facts.evaluated(facts.registered(tmp_path, content), outputs)
    # The bolt has 20 x 20 pixels: small.
    assert results["bbox"]["APs"] == pytest.approx(100.0) and results["segm"]["AP"] == pytest.approx(100.0)


def test_image_and_category_ids_may_be_text(tmp_path: Path):
    """Detectron2's loader hands them on as they are."""
    content = facts.coco_content()
    for entry in content["images"]:
        entry["id"] = f"photo {entry['id']}"
    for entry in content["categories"]:
        entry["id"] = f"class {entry['id']}"
    for entry in content["annotations"]:
        entry |= {"image_id": f"photo {entry['image_id']}", "category_id": f"class {entry['category_id']}"}
    outputs = {f"photo {i}": facts.perfect(i, masks=True) for i in facts.TRUTH}
    for fast in (True, False):
        results = facts.evaluated(facts.registered(tmp_path, content), outputs, use_fast_impl=fast)
        assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100.0)


def test_an_image_that_comes_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    evaluator = COCOEvaluator(facts.registered(tmp_path), distributed=False)
    evaluator.reset()
    for image_id in (1, 2, 2, 3):
        evaluator.process([{"image_id": image_id}], [{"instances": facts.perfect(image_id)}])
    with caplog.at_level(logging.WARNING):
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100.0)
    assert "image_id 2" in caplog.text


def test_image_ids_listed_twice_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    content = facts.coco_content()
    content["images"].append(content["images"][0])
    name = facts.registered(tmp_path, content, read=False)
    with caplog.at_level(logging.WARNING):
        COCOEvaluator(name, distributed=False)
    assert "more than once (ids 1)" in caplog.text


def test_truth_with_no_annotation_at_all_is_nan_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    content = facts.coco_content({1: [], 2: []})
    name = facts.registered(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        results = facts.evaluated(name, {1: facts.perfect(1)})
    assert all(math.isnan(value) for value in results["bbox"].values())
    assert "no annotation at all" in caplog.text


def test_classes_beyond_the_dataset_name_the_key_to_change(tmp_path: Path):
    with pytest.raises(AssertionError, match="image 1.*class 5.*2 classes.*NUM_CLASSES"):
        facts.evaluated(facts.registered(tmp_path), {1: facts.instances([[0, 0, 9, 9]], [0.5], [5])})


def test_predictions_of_unknown_images_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="image_id 77"):
        facts.evaluated(facts.registered(tmp_path), {77: facts.perfect(1)})


def test_masks_without_mask_truth(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    content = facts.coco_content()
    content["annotations"][0]["segmentation"] = []
    outputs = {i: facts.perfect(i, masks=True) for i in facts.TRUTH}
    with caplog.at_level(logging.WARNING):
        results = facts.evaluated(facts.registered(tmp_path, content), outputs)
    assert "1 of 3 annotations have no usable segmentation" in caplog.text
    assert results["bbox"]["AP"] == pytest.approx(100.0)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    with pytest.raises(ValueError, match="none of the 3 annotations has a segmentation"):
        facts.evaluated(facts.registered(tmp_path, content), outputs)


@pytest.mark.parametrize("text", ["[]", "{}", '{"images": []}', "no json"])
def test_files_that_are_no_coco_json(tmp_path: Path, text: str):
    file = tmp_path / "bad.json"
    file.write_text(text)
    name = f"no_coco_{abs(hash(text))}"
    MetadataCatalog.get(name).set(json_file=str(file))
    with pytest.raises(ValueError, match=r"bad\.json is no"):
        COCOEvaluator(name, distributed=False)


@pytest.mark.parametrize("tasks", [("keypoints",), ("boxes",)])
def test_unknown_tasks(tmp_path: Path, tasks: tuple):
    with pytest.raises((ValueError, NotImplementedError), match=tasks[0]):
        COCOEvaluator(facts.registered(tmp_path), tasks=tasks, distributed=False)


def test_proposals_file_loads_without_unpickling_classes(tmp_path: Path):
    proposals = Instances((facts.H, facts.W))
    proposals.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 5, 5]]))
    proposals.objectness_logits = torch.tensor([1.0])
    evaluator = COCOEvaluator(facts.registered(tmp_path), distributed=False, output_dir=str(tmp_path))
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"proposals": proposals}])
    evaluator.evaluate()
    saved = torch.load(tmp_path / "instances_predictions.pth", weights_only=True)
    assert saved[0]["proposals"]["proposal_boxes"].shape == (1, 4)


def test_inference_context_keeps_frozen_parts_in_eval_mode():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout()).train()
    model[0].eval()
    with inference_context(model):
        assert not any(m.training for m in model.modules())
    assert model.training and model[1].training and not model[0].training


def test_inference_context_restores_after_an_error():
    model = nn.Linear(1, 1).train()
    with pytest.raises(KeyError), inference_context(model):
        assert not model.training
        raise KeyError("x")
    assert model.training


def _sem_seg(folder: Path, labels: np.ndarray, name: str) -> SemSegEvaluator:
    Image.fromarray(labels.astype(np.uint8)).save(folder / "labels.png")
    records = [{"file_name": "a.jpg", "sem_seg_file_name": str(folder / "labels.png")}]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(stuff_classes=["wall", "floor"], ignore_label=255)
    evaluator = SemSegEvaluator(name, distributed=False)
    evaluator.reset()
    return evaluator


def test_sem_seg_names_the_file_with_wrong_size_or_labels(tmp_path: Path):
    scores = torch.zeros(2, 8, 8)
    with pytest.raises(ValueError, match=r"a\.jpg.*\(8, 8\).*\(4, 8\)"):
        _sem_seg(tmp_path, np.zeros((4, 8)), "sem_seg_size").process(
            [{"file_name": "a.jpg"}], [{"sem_seg": scores}]
        )
    with pytest.raises(ValueError, match=r"labels\.png.*labels 9.*2 classes"):
        evaluator = _sem_seg(tmp_path, np.full((8, 8), 9), "sem_seg_labels")
        evaluator.process([{"file_name": "a.jpg"}], [{"sem_seg": scores}])


def test_a_full_disk_costs_files_but_no_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """What an earlier evaluation wrote stays whole."""
    name = facts.registered(tmp_path)
    outputs = {i: facts.perfect(i, masks=True) for i in facts.TRUTH}
    out = tmp_path / "out"
    results = facts.evaluated(name, outputs, output_dir=str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    again = facts.evaluated(name, {1: facts.perfect(1, masks=True)} | outputs, output_dir=str(out))
    assert str(again) == str(results)
    assert f"Results are not in {out}/coco_instances_results.json: [Errno 28] No space left" in caplog.text
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
