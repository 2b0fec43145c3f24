"""COCO's numbers: average precision of boxes and masks, average recall of proposals.

Protocol: https://cocodataset.org/#detection-eval.
IoU thresholds 0.50:0.05:0.95. Object sizes in pixels of area: small < 32^2 <= medium < 96^2 <= large.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core.coco import COCO

from detectron2.structures import Boxes, BoxMode, pairwise_iou

from ._coco_matching import AREAS, IOU_THRESHOLDS, Curves, match

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# Area ranges of the proposal evaluation, both ends included.
_PROPOSAL_AREAS: dict[str, tuple[float, float]] = {
    "": (0.0, 1e10),
    "s": (0.0, 32.0**2),
    "m": (32.0**2, 96.0**2),
    "l": (96.0**2, 1e10),
}


def match_detections(
    truth: COCO,
    detections: Sequence[Mapping[str, Any]],
    iou_type: str,
    max_dets: Sequence[int],
    image_ids: Sequence[int] | None = None,
    fast: bool = True,
) -> Curves:
    """Match detections with the truth.

    Args:
        truth: ground truth with annotations.
        detections: at least one entry of the COCO results format; ids as in the truth. Not changed.
        iou_type: "bbox" or "segm".
        max_dets: detections per image and category that count, ascending; the last one is that of all AP
            metrics.
        image_ids: evaluate these only.
        fast: False takes pycocotools, which is slower and equal.
    """
    matcher = match if fast else _by_pycocotools
    return matcher(truth, detections, iou_type, max_dets, image_ids)


def _by_pycocotools(
    truth: COCO,
    detections: Sequence[Mapping[str, Any]],
    iou_type: str,
    max_dets: Sequence[int],
    image_ids: Sequence[int] | None,
) -> Curves:
    from pycocotools.coco import COCO as PythonCOCO
    from pycocotools.cocoeval import COCOeval

    rows = [dict(row) for row in detections]
    if iou_type == "segm":
        for row in rows:
            # With a box present the size class would be that of the box instead of the mask.
            row.pop("bbox", None)
    with contextlib.redirect_stdout(io.StringIO()):
        slow = PythonCOCO()
        slow.dataset = {**truth.dataset, "annotations": [dict(a) for a in truth.dataset["annotations"]]}
        slow.createIndex()
        slow.dataset.setdefault("info", {})
        evaluation = COCOeval(slow, slow.loadRes(rows), iou_type)
        evaluation.params.maxDets = list(max_dets)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    return Curves(
        evaluation.eval["precision"][..., -1],
        evaluation.eval["recall"],
        evaluation.params.catIds,
        list(max_dets),
    )


def average_precision(curves: Curves) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl in percent; NaN where the truth has no such object."""
    values = {"AP": _ap(curves), "AP50": _ap(curves, iou=0.5), "AP75": _ap(curves, iou=0.75)}
    return values | {f"AP{size[0]}": _ap(curves, size=size) for size in ("small", "medium", "large")}


def average_precision_per_category(curves: Curves) -> dict[int, float]:
    """{category id of the truth: AP in percent}, NaN for categories without objects."""
    return {category: _ap(curves, category=k) for k, category in enumerate(curves.category_ids)}


def _ap(curves: Curves, iou: float | None = None, category: int | None = None, size: str = "all") -> float:
    precision = curves.precision[..., list(AREAS).index(size)]  # (IoU, recall, category)
    if iou is not None:
        precision = precision[np.isclose(IOU_THRESHOLDS, iou)]
    if category is not None:
        precision = precision[:, :, category]
    return _percent(precision)


def _percent(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) * 100 if defined.size else float("nan")


def summary_lines(curves: Curves) -> list[str]:
    """The table that every COCO evaluation prints: six lines of AP, then AR by limit and by size."""
    most = curves.max_dets[-1]
    whole = f"{IOU_THRESHOLDS[0]:.2f}:{IOU_THRESHOLDS[-1]:.2f}"

    def line(kind: str, label: str, size: str, count: int, percent: float) -> str:
        value = -1.0 if np.isnan(percent) else percent / 100
        title, short = f"Average {kind}", f"(A{kind[0]})"
        where = f"IoU={label:<9} | area={size:>6s} | maxDets={count:>3d}"
        return f" {title:<18} {short} @[ {where} ] = {value:0.3f}"

    parts = list(enumerate(AREAS))[1:]
    lines = [line("Precision", whole, "all", most, _ap(curves))]
    lines += [line("Precision", f"{iou:.2f}", "all", most, _ap(curves, iou=iou)) for iou in (0.5, 0.75)]
    lines += [line("Precision", whole, size, most, _ap(curves, size=size)) for _, size in parts]
    lines += [
        line("Recall", whole, "all", limit, _percent(curves.recall[:, :, 0, m]))
        for m, limit in enumerate(curves.max_dets)
    ]
    lines += [line("Recall", whole, size, most, _percent(curves.recall[:, :, a, -1])) for a, size in parts]
    return lines


def proposal_recall(
    predictions: Sequence[Mapping[str, Any]], truth: COCO, size: str = "", limit: int | None = None
) -> dict[str, Any]:
    """Recall of class-agnostic boxes. A proposal covers at most one truth box, and the other way round.

    Args:
        predictions: dicts with ``image_id`` and ``proposals`` (Instances with proposal_boxes,
            objectness_logits).
        truth: ground truth; crowds do not count.
        size: "" (all), "s", "m", "l".
        limit: proposals per image, best objectness first; None for all.
    Returns:
        ``ar``: mean recall over ``thresholds``, 0..1, NaN without objects; ``recalls``: at each of them;
        ``gt_overlaps``: sorted IoU of each truth box with its proposal; ``num_pos``: number of truth boxes.
    """
    lowest, highest = _PROPOSAL_AREAS[size]
    overlaps = []
    for prediction in predictions:
        objects = [
            a
            for a in truth.imgToAnns.get(prediction["image_id"], [])
            if a["iscrowd"] == 0 and lowest <= a["area"] <= highest
        ]
        if not objects:
            continue
        proposals = prediction["proposals"]
        order = proposals.objectness_logits.argsort(descending=True)[:limit]
        boxes = [BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for a in objects]
        iou = pairwise_iou(Boxes(torch.tensor(boxes, dtype=torch.float32)), proposals.proposal_boxes[order])
        overlaps.append(_cover_greedily(iou))
    found = torch.cat(overlaps).sort().values if overlaps else torch.zeros(0)
    thresholds = torch.arange(0.5, 0.95 + 1e-5, 0.05)
    recalls = torch.stack([(found >= t).float().mean() for t in thresholds])
    return {
        "ar": recalls.mean(),
        "recalls": recalls,
        "thresholds": thresholds,
        "gt_overlaps": found,
        "num_pos": len(found),
    }


def _cover_greedily(iou: torch.Tensor) -> torch.Tensor:
    """(truth, proposals) -> (truth,): the best pair first, then without these two; 0 for the rest."""
    num_truth, num_proposals = iou.shape
    covered = torch.zeros(num_truth)
    left = iou.clone()
    for _ in range(min(num_truth, num_proposals)):
        best = int(left.argmax())
        row, column = divmod(best, num_proposals)
        covered[row] = iou[row, column]
        left[row, :] = -1
        left[:, column] = -1
    return covered


def proposal_metrics(predictions: Sequence[Mapping[str, Any]], truth: COCO) -> dict[str, float]:
    """AR@100, AR@1000 and by object size, in percent."""
    metrics = {}
    for limit in (100, 1000):
        for size in _PROPOSAL_AREAS:
            value = proposal_recall(predictions, truth, size, limit)["ar"]
            metrics[f"AR{size}@{limit:d}"] = float(value) * 100
    return metrics
