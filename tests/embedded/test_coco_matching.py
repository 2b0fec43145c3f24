"""COCO's matching and mask coding of the embedded engine are pycocotools' to the last bit."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_coding
import pytest
import torch

import detectron2

if not hasattr(detectron2, "EMBEDDED_IN"):
    pytest.skip("about the embedded engine", allow_module_level=True)

from detectron2.evaluation import _coco_metrics as metrics
from detectron2.evaluation._coco_truth import index_truth
from detectron2.evaluation._mask_coding import encode_masks


def coded(mask: np.ndarray) -> dict:
    code = mask_coding.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode("ascii")}


# ------------------------------------------------------------------------------------------ mask coding


def all_kinds_of_masks() -> list[np.ndarray]:
    """Empty, full, single pixels in the corners, full columns that follow each other, checkerboard, long runs."""
    empty, rows, columns = np.zeros((9, 7), bool), np.arange(9)[:, None], np.arange(7)
    corner = np.zeros((2, 2, 9, 7), bool)
    corner[0, 0, 0, 0] = corner[0, 1, 0, -1] = corner[1, 0, -1, 0] = corner[1, 1, -1, -1] = True
    masks = [empty, ~empty, *corner.reshape(4, 9, 7), empty | (columns > 2), empty | (rows > 3)]
    masks += [(rows + columns) % 2 == 0, empty | ((columns > 1) & (columns < 5)), (rows > 2) & (columns > 3)]
    return masks


@pytest.mark.parametrize(
    "box", [[0, 0, 7, 9], [2, 3, 5, 6], [-4, -4, 30, 30], [5, 5, 1, 1], [float("nan")] * 4]
)
def test_run_lengths_are_those_of_pycocotools_whatever_the_box(box):
    """The box says where to look first; a mask that reaches out of it is found all the same."""
    masks = all_kinds_of_masks()
    boxes = torch.tensor([box] * len(masks), dtype=torch.float32)
    assert encode_masks(torch.from_numpy(np.stack(masks)), boxes) == [coded(mask) for mask in masks]


def test_long_runs_and_large_differences():
    """1000x900 pixels: run lengths of one to four characters, with either sign of their differences."""
    draw = np.random.default_rng(0)
    mask = np.zeros((1000, 900), bool)
    for x, y, side in draw.integers(0, 700, (12, 3)):
        mask[y : y + side, x : x + side // 3] ^= True
    assert encode_masks(torch.from_numpy(mask)[None], torch.zeros(1, 4)) == [coded(mask)]


def test_no_mask():
    assert encode_masks(torch.zeros(0, 4, 4, dtype=torch.bool), torch.zeros(0, 4)) == []


# ---------------------------------------------------------------------------------------------- matching


def random_world(seed: int):
    """Few classes and small images, so that everything meets: crowds, equal scores, objects without a detection,
    detections of classes and of sizes that the truth lacks, masks of several polygons, images in disorder.
    """
    draw = np.random.default_rng(seed)
    height, width = draw.integers(20, 150, 2).tolist()
    images = [
        {"id": int(i), "height": height, "width": width} for i in draw.permutation(20)[: draw.integers(1, 5)]
    ]
    classes = [{"id": int(c), "name": str(c)} for c in draw.permutation(9)[: draw.integers(1, 4)]]

    def box() -> list[int]:
        x0, x1 = sorted(draw.integers(0, width, 2).tolist())
        y0, y1 = sorted(draw.integers(0, height, 2).tolist())
        return [x0, y0, x1 - x0 + 1, y1 - y0 + 1]

    def mask(x: int, y: int, w: int, h: int) -> dict:
        filled = np.zeros((height, width), bool)
        filled[y : y + h, x : x + w] = draw.random((h, w)) < draw.choice([0.8, 1.0])
        return coded(filled)

    objects, detections = [], []

    def detect(image: dict, near: list[int], class_id: int) -> None:
        score = float(draw.choice([draw.random(), 0.5, 0.25]))
        detections.append({"image_id": image["id"], "category_id": class_id, "score": score, "bbox": near})
        detections[-1]["segmentation"] = mask(*near)

    for image in images:
        for _ in range(draw.integers(0, 8)):
            x, y, w, h = here = box()
            polygons = [[x, y, x + w, y, x + w, y + h, x, y + h], [1, 1, 5, 1, 5, 5]][: draw.integers(1, 3)]
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image["id"],
                    "category_id": int(draw.choice([c["id"] for c in classes])),
                    "bbox": here,
                    "area": w * h * float(draw.choice([0.7, 1.0])),
                    "iscrowd": int(draw.random() < 0.2),
                    "segmentation": polygons if draw.random() < 0.5 else mask(*here),
                }
            )
            for _ in range(draw.integers(0, 4)):
                shifted = np.array(here) + draw.integers(-3, 4, 4) * (draw.random() < 0.7)
                x, y = np.clip(shifted[:2], 0, [width - 1, height - 1]).tolist()
                w, h = np.clip(shifted[2:], 1, [width - x, height - y]).tolist()
                detect(image, [x, y, w, h], objects[-1]["category_id"])
        for _ in range(draw.integers(0, 3)):
            detect(image, box(), int(draw.choice([*(c["id"] for c in classes), 77])))
    return index_truth({"images": images, "annotations": objects, "categories": classes}, "world"), detections


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("max_dets", [(1, 10, 100), (1, 2, 3)])
def test_curves_are_those_of_pycocotools(iou_type, max_dets):
    compared = 0
    for seed in range(25):
        truth, detections = random_world(seed)
        image_ids = None if seed % 3 else list(truth.imgs)[:2]
        if not any(image_ids is None or row["image_id"] in image_ids for row in detections):
            continue
        ours, theirs = (
            metrics.match_detections(truth, detections, iou_type, max_dets, image_ids, fast)
            for fast in (True, False)
        )
        assert np.array_equal(ours.precision, theirs.precision), seed
        assert np.array_equal(ours.recall, theirs.recall), seed
        assert ours.category_ids == theirs.category_ids
        compared += (ours.precision > 0).any()
    assert compared > 10


def test_pairs_in_portions_are_the_same_pairs(monkeypatch):
    truth, detections = random_world(4)
    whole = metrics.match_detections(truth, detections, "bbox", (1, 10, 100))
    monkeypatch.setattr("detectron2.evaluation._coco_matching._PAIRS_AT_A_TIME", 2)
    parts = metrics.match_detections(truth, detections, "bbox", (1, 10, 100))
    assert np.array_equal(whole.precision, parts.precision) and (whole.precision > 0).any()
