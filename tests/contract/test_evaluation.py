"""Evaluation: metrics that can be worked out by hand, and what evaluators do around them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.evaluation.fast_eval_api import COCOeval_opt
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, Instances

H, W = 100, 120
_numbers = count()
# image id -> boxes (XYXY) and category ids of the json
TRUTH = {
    1: [([10, 10, 60, 50], 3), ([70, 20, 90, 40], 7)],
    2: [([0, 0, 100, 100], 3)],
    3: [],
}


def coco_content(truth: dict = TRUTH) -> dict:
    images = [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in truth]
    annotations = []
    for image_id, objects in truth.items():
        for (x0, y0, x1, y1), category in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )
    categories = [{"id": 3, "name": "nut"}, {"id": 7, "name": "bolt"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def registered(folder: Path, content: dict | None = None, read: bool = True) -> str:
    name = f"{folder.parent.name}_{folder.name}_{next(_numbers)}"
    file = folder / f"{name}.json"
    file.write_text(json.dumps(coco_content() if content is None else content))
    register_coco_instances(name, {}, str(file), "")
    if read:
        DatasetCatalog.get(name)
    return name


def instances(boxes: list, scores: list, classes: list, masks: bool = False) -> Instances:
    found = Instances((H, W))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.tensor(scores, dtype=torch.float32)
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if masks:
        found.pred_masks = torch.zeros((len(boxes), H, W), dtype=torch.bool)
        for k, (x0, y0, x1, y1) in enumerate(boxes):
            found.pred_masks[k, y0:y1, x0:x1] = True
    return found


def perfect(image_id: int, masks: bool = False) -> Instances:
    objects = TRUTH[image_id]
    classes = [{3: 0, 7: 1}[category] for _, category in objects]
    return instances([box for box, _ in objects], [0.9] * len(objects), classes, masks)


def evaluated(name: str, outputs: dict[int, Instances], **options) -> dict:
    evaluator = COCOEvaluator(name, distributed=False, **options)
    evaluator.reset()
    for image_id, found in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    return evaluator.evaluate()


def test_perfect_predictions_reach_100(tmp_path: Path):
    results = evaluated(registered(tmp_path), {i: perfect(i, masks=True) for i in TRUTH})
    assert list(results) == ["bbox", "segm"]
    for metrics in results.values():
        for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AP-nut", "AP-bolt"):
            assert metrics[key] == pytest.approx(100.0)


def test_ap_counts_the_thresholds_below_the_iou(tmp_path: Path):
    """A box over the left 72 % of the only object: IoU 0.72 passes 5 of 10 thresholds, 0.50 to 0.70."""
    name = registered(tmp_path, coco_content({1: [([0, 0, 100, 50], 3)]}))
    results = evaluated(name, {1: instances([[0, 0, 72, 50]], [0.9], [0])}, tasks=("bbox",))
    assert results["bbox"]["AP"] == pytest.approx(50.0)
    assert results["bbox"]["AP50"] == pytest.approx(100.0)
    assert results["bbox"]["AP75"] == pytest.approx(0.0)


def test_masks_are_measured_as_masks(tmp_path: Path):
    """The box is right, its mask holds 60 % of the pixels: it passes 3 of 10 thresholds, 0.50 to 0.60."""
    name = registered(tmp_path, coco_content({1: [([0, 0, 100, 50], 3)]}))
    found = instances([[0, 0, 100, 50]], [0.9], [0], masks=True)
    found.pred_masks[0, 30:] = False
    results = evaluated(name, {1: found})
    assert results["bbox"]["AP"] == pytest.approx(100.0)
    assert results["segm"]["AP"] == pytest.approx(30.0)


def test_a_false_positive_with_a_higher_score_halves_precision(tmp_path: Path):
    name = registered(tmp_path, coco_content({1: [([10, 10, 60, 50], 3)]}))
    found = instances([[70, 60, 110, 90], [10, 10, 60, 50]], [0.9, 0.8], [0, 0])
    assert evaluated(name, {1: found})["bbox"]["AP"] == pytest.approx(50.0)
    # With a lower score it changes nothing: full recall is reached before it.
    found.scores = torch.tensor([0.7, 0.8])
    assert evaluated(name, {1: found})["bbox"]["AP"] == pytest.approx(100.0)


def test_sizes_that_the_truth_lacks_are_nan(tmp_path: Path):
    name = registered(tmp_path, coco_content({1: [([10, 10, 60, 50], 3)]}))
    metrics = evaluated(name, {1: instances([[10, 10, 60, 50]], [0.9], [0])})["bbox"]
    assert metrics["APm"] == pytest.approx(100.0)
    assert math.isnan(metrics["APs"]) and math.isnan(metrics["APl"]) and math.isnan(metrics["AP-bolt"])


def test_no_detection_at_all_is_nan_and_no_output_is_empty(tmp_path: Path):
    name = registered(tmp_path)
    nothing = evaluated(name, {i: instances([], [], []) for i in TRUTH})
    assert list(nothing) == ["bbox"] and all(math.isnan(v) for v in nothing["bbox"].values())
    assert not evaluated(name, {})


def test_fast_and_python_implementation_agree(tmp_path: Path):
    name = registered(tmp_path)
    rng = np.random.RandomState(0)
    outputs = {}
    for image_id, objects in TRUTH.items():
        boxes = [
            np.clip(np.array(b) + rng.randint(-6, 7, 4), 0, 100).tolist() for b, _ in objects for _ in "ab"
        ]
        outputs[image_id] = instances(
            boxes, rng.rand(len(boxes)).tolist(), rng.randint(0, 2, len(boxes)).tolist(), True
        )
    fast, slow = (evaluated(name, outputs, use_fast_impl=fast) for fast in (True, False))
    assert flatten_results_dict(fast) == pytest.approx(flatten_results_dict(slow), nan_ok=True)


def test_classes_that_the_dataset_has_not_are_refused(tmp_path: Path):
    with pytest.raises(AssertionError):
        evaluated(registered(tmp_path), {1: instances([[0, 0, 9, 9]], [0.5], [2])})


@pytest.mark.parametrize(
    "changed", [{}, {"maxDets": [1, 2, 5]}, {"useCats": 0}, {"iouThrs": np.array([0.3])}]
)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_compiled_evaluation_takes_what_pycocotools_takes(tmp_path: Path, iou_type: str, changed: dict):
    """``COCOeval_opt`` in the place of ``COCOeval``, with pycocotools' objects and changed parameters."""
    file = tmp_path / "truth.json"
    file.write_text(json.dumps({"info": {}, **coco_content()}))
    found = [([12, 10, 60, 52], 3, 0.9), ([70, 20, 90, 38], 7, 0.8), ([1, 1, 30, 30], 3, 0.7)]
    rows = [
        {
            "image_id": 1,
            "category_id": category,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
            "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        }
        for (x0, y0, x1, y1), category, score in found
    ]
    measured = []
    for implementation in (COCOeval, COCOeval_opt):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(file))
            evaluation = implementation(truth, truth.loadRes(copy.deepcopy(rows)), iou_type)
            for name, value in changed.items():
                setattr(evaluation.params, name, value)
            evaluation.evaluate()
            evaluation.accumulate()
        measured.append(evaluation.eval)
    assert (measured[0]["precision"] > 0.5).any()
    for curve in ("precision", "recall"):
        assert np.allclose(measured[0][curve], measured[1][curve], atol=1e-9)


def test_the_compiled_evaluation_fails_as_pycocotools_does(tmp_path: Path):
    content = {"info": {}, **coco_content()}
    del content["annotations"][0]["area"]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "truth.json"))
        row = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 0.5}
        for implementation in (COCOeval, COCOeval_opt):
            with pytest.raises(KeyError, match="area"):
                implementation(truth, truth.loadRes([dict(row)]), "bbox").evaluate()


def test_files_hold_categories_of_the_json(tmp_path: Path):
    evaluated(registered(tmp_path), {i: perfect(i) for i in TRUTH}, output_dir=str(tmp_path / "out"))
    rows = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert [row["category_id"] for row in rows] == [3, 7, 3]
    assert rows[0]["bbox"] == [10, 10, 50, 40]
    saved = torch.load(tmp_path / "out/instances_predictions.pth", weights_only=True)
    assert [prediction["image_id"] for prediction in saved] == [1, 2, 3]


def test_truth_without_annotations_is_written_not_evaluated(tmp_path: Path):
    content = coco_content()
    del content["annotations"]
    name = registered(tmp_path, content, read=False)
    evaluator = COCOEvaluator(name, distributed=False, output_dir=str(tmp_path / "out"))
    evaluator._metadata.set(thing_dataset_id_to_contiguous_id={3: 0, 7: 1}, thing_classes=["nut", "bolt"])
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": perfect(1)}])
    assert not evaluator.evaluate()
    assert len(json.loads((tmp_path / "out/coco_instances_results.json").read_text())) == 2


def test_proposal_recall(tmp_path: Path):
    """One of two objects is hit exactly, the other not at all: recall 1/2 at every threshold."""
    name = registered(tmp_path, coco_content({1: TRUTH[1]}))
    proposals = Instances((H, W))
    proposals.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 5, 5], [10, 10, 60, 50]]))
    proposals.objectness_logits = torch.tensor([1.0, 2.0])
    evaluator = COCOEvaluator(name, distributed=False, output_dir=str(tmp_path))
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"proposals": proposals}])
    recall = evaluator.evaluate()["box_proposals"]
    assert recall["AR@100"] == pytest.approx(50.0)
    assert recall["ARm@1000"] == pytest.approx(100.0) and recall["ARs@100"] == pytest.approx(0.0)


def test_instances_to_coco_json():
    rows = instances_to_coco_json(instances([[1, 2, 4, 8]], [0.5], [1], masks=True), 9)
    assert rows[0]["image_id"] == 9 and rows[0]["category_id"] == 1 and rows[0]["bbox"] == [1, 2, 3, 6]
    assert rows[0]["segmentation"]["size"] == [H, W] and isinstance(rows[0]["segmentation"]["counts"], str)
    assert instances_to_coco_json(instances([], [], []), 9) == []


def test_sem_seg_scores_worked_out_by_hand(tmp_path: Path):
    """Eight pixels, one of them ignored. Class 0: 3 right of 4, class 1: 2 right of 3, one mistaken each way,
    class 2 nowhere in the truth.
    """
    truth = np.array([[0, 0, 0, 0], [1, 1, 1, 255]], np.uint8)
    predicted = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 2]])
    Image.fromarray(truth).save(tmp_path / "a.png")
    name = f"contract_sem_seg_{next(_numbers)}"
    DatasetCatalog.register(
        name, lambda: [{"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "a.png")}]
    )
    MetadataCatalog.get(name).set(stuff_classes=["sky", "sea", "land"], ignore_label=255)
    evaluator = SemSegEvaluator(name, distributed=False)
    evaluator.reset()
    scores = torch.nn.functional.one_hot(predicted, 3).permute(2, 0, 1).float()
    evaluator.process([{"file_name": "a.jpg"}], [{"sem_seg": scores}])
    found = evaluator.evaluate()["sem_seg"]
    assert found["IoU-sky"] == pytest.approx(100 * 3 / 5) and found["IoU-sea"] == pytest.approx(100 * 2 / 4)
    assert math.isnan(found["IoU-land"])
    assert found["mIoU"] == pytest.approx(55.0) and found["pACC"] == pytest.approx(100 * 5 / 7)
    assert found["fwIoU"] == pytest.approx(60 * 4 / 7 + 50 * 3 / 7)
    assert found["mACC"] == pytest.approx((75 + 200 / 3) / 2)


class Counting(DatasetEvaluator):
    def __init__(self, task: str = "counting") -> None:
        self.task = task

    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(outputs)

    def evaluate(self):
        return {self.task: {"images": self.images}}


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        return [2 * x["value"] for x in batch]


def test_inference_on_dataset_counts_and_restores_the_mode():
    model = Doubling().train()
    loader = [[{"value": 1}, {"value": 2}], [{"value": 3}]]
    calls = []
    callbacks = {
        m: lambda m=m: calls.append(m) for m in ("on_start", "before_inference", "after_inference", "on_end")
    }
    results = inference_on_dataset(model, loader, [Counting("a"), Counting("b")], callbacks)
    assert results == {"a": {"images": 3}, "b": {"images": 3}}
    assert model.training and torch.is_grad_enabled()
    assert calls == ["on_start", *["before_inference", "after_inference"] * 2, "on_end"]
    assert inference_on_dataset(model, loader, None) == {}


def test_two_evaluators_must_not_report_one_task():
    both = DatasetEvaluators([Counting(), Counting()])
    both.reset()
    with pytest.raises((AssertionError, ValueError)):
        both.evaluate()


def test_flatten_results():
    assert flatten_results_dict({"bbox": {"AP": 1.0, "deep": {"x": 2}}, "n": 3}) == {
        "bbox/AP": 1.0,
        "bbox/deep/x": 2,
        "n": 3,
    }


def test_print_csv_format(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="detectron2.evaluation.testing"):
        print_csv_format({"bbox": {"AP": 12.34567, "AP50": 20.0, "AP-nut": 1.0}})
    assert [r.getMessage() for r in caplog.records] == [
        "copypaste: Task: bbox",
        "copypaste: AP,AP50",
        "copypaste: 12.3457,20.0000",
    ]


@pytest.mark.parametrize(
    ("expected", "passes"),
    [
        ([], True),
        ([["bbox", "AP", 40.0, 0.5]], True),
        ([["bbox", "AP", 41.0, 0.5]], False),
        ([["bbox", "APs", 0.0, 100.0]], False),  # NaN
        ([["bbox", "AP99", 1.0, 1.0]], False),
    ],
)
def test_verify_results(expected: list, passes: bool):
    cfg = SimpleNamespace(TEST=SimpleNamespace(EXPECTED_RESULTS=expected))
    results = {"bbox": {"AP": 40.4, "APs": float("nan")}}
    if passes:
        assert verify_results(cfg, results)
    else:
        with pytest.raises(SystemExit) as left:
            verify_results(cfg, results)
        assert left.value.code == 1
