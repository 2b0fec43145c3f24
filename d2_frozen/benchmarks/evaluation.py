"""How long does COCO evaluation take? Detections of a generated world, with about the counts of COCO's val set.

Images of 640x480 with 7 objects of 80 classes on average, 50 to 100 detections each, boxes and masks: some near an
object, most not. The truth is a json file, as it is for a user. Boxes, masks and scores are functions of the seed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from d2_frozen.benchmarks.measuring import Clock, Run, Task
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

_SEED = 0
_WIDTH, _HEIGHT = 640, 480
_CLASSES = 80
_OBJECTS, _MOST_OBJECTS = 7.3, 60
_DETECTIONS = (50, 100)
_CORNERS = 24
_DATASET = "bench_coco_evaluation"


def evaluation_task(settings: dict[str, Any], now: Clock) -> Task:
    """Evaluate ``settings["images"]`` images: read the truth, take in predictions, measure; files are written."""
    kept = tempfile.TemporaryDirectory(prefix="d2_frozen_bench_")  # as long as the task
    folder = Path(kept.name)
    truth = generated_truth(settings["images"])
    (folder / "truth.json").write_text(json.dumps(truth), encoding="utf-8")
    register_coco_instances(_DATASET, {}, folder / "truth.json", folder)
    load_coco_json(folder / "truth.json", folder, _DATASET)  # enters the class names, as a data loader does
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)

    def run(turn: int) -> Run:
        start = now()
        evaluator = COCOEvaluator(_DATASET, output_dir=kept.name)
        evaluator.reset()
        seconds = {"read truth": now() - start, "process": 0.0}
        for image_id, present in objects.items():
            found = generated_detections(present, (_SEED, turn, image_id))
            start = now()
            evaluator.process([{"image_id": image_id}], [{"instances": found}])
            seconds["process"] += now() - start
        start = now()
        results = evaluator.evaluate()
        seconds["evaluate"] = now() - start
        seconds["evaluation"] = sum(seconds.values())
        metrics = {f"{task}/{name}": ap for task, values in results.items() for name, ap in values.items()}
        return Run(seconds, {name: value for name, value in metrics.items() if value == value})  # without NaN

    return run


def generated_truth(images: int) -> dict[str, Any]:
    """A COCO json: polygons of all sizes; class k is k times as rare as the first."""
    draw = np.random.default_rng(_SEED)
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        for box in _boxes(draw, min(int(draw.geometric(1 / _OBJECTS)), _MOST_OBJECTS)):
            outline = _outline(draw, box)
            (x0, y0), (x1, y1) = outline.min(axis=0), outline.max(axis=0)
            x, y = outline.T
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(draw.choice(_CLASSES, p=_frequencies())) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2,
                    "iscrowd": int(draw.random() < 0.01),
                    "segmentation": [outline.round(2).reshape(-1).tolist()],
                }
            )
    numbers = range(1, images + 1)
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": _WIDTH, "height": _HEIGHT} for i in numbers],
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(_CLASSES)],
    }


def generated_detections(objects: list[dict[str, Any]], seed: tuple[int, ...]) -> Instances:
    """Up to two detections near each object, four in five of its class; the rest anywhere, with low scores."""
    draw = np.random.default_rng(seed)
    boxes, classes, scores = [], [], []
    for annotation in objects:
        x, y, w, h = annotation["bbox"]
        for _ in range(draw.integers(0, 3)):
            boxes.append([x, y, x + w, y + h] + draw.normal(0, 0.08, 4) * [w, h, w, h])
            right = draw.random() < 0.8
            classes.append(annotation["category_id"] - 1 if right else draw.integers(_CLASSES))
            scores.append(draw.beta(4, 2))
    lowest, most = _DETECTIONS
    present = [annotation["category_id"] - 1 for annotation in objects]
    for box in _boxes(draw, max(0, int(draw.integers(lowest, most + 1)) - len(boxes))):
        boxes.append(box)
        # A network mistakes background for what is in the image anyway.
        classes.append(
            draw.choice(present) if draw.random() < 0.6 else draw.choice(_CLASSES, p=_frequencies())
        )
        scores.append(0.05 + 0.4 * draw.beta(1, 4))
    corners = np.clip(np.array(boxes[:most]), 0, [_WIDTH, _HEIGHT, _WIDTH, _HEIGHT])
    masks = np.zeros((len(corners), _HEIGHT, _WIDTH), dtype=np.uint8)
    for mask, box in zip(masks, corners):
        cv2.fillPoly(mask, [_outline(draw, box).round().astype(np.int32)], 1)
    found = Instances((_HEIGHT, _WIDTH))
    found.pred_boxes = Boxes(torch.from_numpy(corners).float())
    found.scores = torch.tensor(scores[:most], dtype=torch.float32)
    found.pred_classes = torch.tensor(np.array(classes[:most], dtype=np.int64))
    found.pred_masks = torch.from_numpy(masks).bool()
    return found


def _frequencies() -> np.ndarray:
    share = 1 / np.arange(1, _CLASSES + 1)
    return share / share.sum()


def _boxes(draw: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) XYXY inside the image, sides from 16 to 300 pixels, as many small ones as large ones."""
    side, stretch = np.exp(draw.uniform(np.log(16), np.log(300), count)), np.exp(draw.normal(0, 0.25, count))
    size = np.minimum(np.stack([side * stretch, side / stretch], axis=1), [0.9 * _WIDTH, 0.9 * _HEIGHT])
    corner = draw.uniform(0, 1, (count, 2)) * ([_WIDTH, _HEIGHT] - size)
    return np.concatenate([corner, corner + size], axis=1)


def _outline(draw: np.random.Generator, box: np.ndarray) -> np.ndarray:
    """(corners, 2): an uneven ellipse in a box."""
    angle = np.arange(_CORNERS) * (2 * np.pi / _CORNERS)
    radius = np.clip(1 + 0.15 * draw.normal(size=_CORNERS), 0.6, 1)
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (box[:2] + box[2:]) / 2 + radius[:, None] * direction * (box[2:] - box[:2]) / 2
