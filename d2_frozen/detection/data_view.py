"""Labelled boxes and masks as pictures and numbers, with the question whether the anchors fit them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from d2_frozen.data.prepare import class_names
from d2_frozen.detection.pictures import captioned, labelled, spread
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.utils.visualizer import Visualizer

_CLASSES_SHOWN = 30
# Where RPN's positive anchors begin to be rare (its default thresholds are 0.3 and 0.7), and when it is worth a word.
_GOOD_OVERLAP, _POOR_SHARE = 0.5, 0.1


class DetectionData:
    """See :class:`d2_frozen.tasks.DataView`."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def labelled(self, dataset_name: str, count: int) -> list[np.ndarray]:
        records = DatasetCatalog.get(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        shown = [records[i] for i in spread(len(records), count)]
        return [captioned(labelled(record, metadata), Path(record["file_name"]).name) for record in shown]

    def sample(self, sample: dict[str, Any]) -> list[np.ndarray]:
        pixels = utils.convert_image_to_rgb(sample["image"].permute(1, 2, 0), self.cfg.INPUT.FORMAT)
        truth = sample["instances"]
        names = self._names()
        labels = [names[k] if k < len(names) else str(k) for k in truth.gt_classes.tolist()]
        picture = Visualizer(np.ascontiguousarray(pixels, dtype=np.uint8))
        if len(truth):
            masks = truth.gt_masks if truth.has("gt_masks") else None
            picture.overlay_instances(boxes=truth.gt_boxes, masks=masks, labels=labels)
        return [captioned(picture.output.get_image(), Path(sample["file_name"]).name)]

    def dataset_facts(self, dataset_name: str) -> str:
        records = DatasetCatalog.get(dataset_name)
        objects = [one for record in records for one in record.get("annotations", ())]
        crowds = sum(bool(one.get("iscrowd", 0)) for one in objects)
        empty = sum(not record.get("annotations") for record in records)
        line = (
            f"{dataset_name}: {len(records)} images, {empty} of them without objects; {len(objects)} objects"
        )
        line += f", {crowds} of them crowds" if crowds else ""
        names = class_names(dataset_name) or []
        of_class = Counter(one["category_id"] for one in objects)
        images_with = Counter(
            k for record in records for k in {one["category_id"] for one in record.get("annotations", ())}
        )
        rows = [
            [names[k] if k < len(names) else str(k), of_class[k], images_with[k]]
            for k in sorted({*range(len(names)), *of_class}, key=lambda k: (-of_class[k], k))
        ]
        return "\n".join([line, tabulate(shortened(rows), headers=["class", "objects", "images"])])

    def sample_facts(self, samples: Sequence[dict[str, Any]]) -> str:
        boxes = [sample["instances"].gt_boxes.tensor.numpy() for sample in samples]
        empty = sum(not len(of_sample) for of_sample in boxes)
        lines = [f"{len(samples)} training samples, {empty} of them without objects"]
        sides = np.concatenate(boxes).reshape(-1, 4)
        sides = sides[:, 2:] - sides[:, :2]
        if not len(sides):
            return lines[0]
        shares = (5, 25, 50, 75, 95)
        sizes = np.percentile(np.sqrt(sides.prod(axis=1)), shares)
        lines.append(
            "size of their objects (root of the box's area): "
            + ", ".join(f"{size:.0f} px ({share} %)" for share, size in zip(shares, sizes))
        )
        lines += self._anchors(sides)
        return "\n".join(lines)

    def _names(self) -> list[str]:
        return next((found for name in self.cfg.DATASETS.TRAIN if (found := class_names(name))), [])

    def _anchors(self, sides: np.ndarray) -> list[str]:
        generator = self.cfg.MODEL.ANCHOR_GENERATOR
        sizes = sorted({float(size) for of_map in generator.SIZES for size in of_map})
        ratios = sorted({float(ratio) for of_map in generator.ASPECT_RATIOS for ratio in of_map})
        best = best_overlaps(sides, sizes, ratios)
        poor = float((best < _GOOD_OVERLAP).mean())
        small, large = sides.min(axis=1) < sizes[0] / 2, sides.max(axis=1) > 2 * sizes[-1]
        lines = [
            f"anchors of {', '.join(f'{size:g}' for size in sizes)} px: {poor:.1%} of the objects overlap with none by "
            f"{_GOOD_OVERLAP} or more (IoU, where it lies best); {small.mean():.1%} have a side below "
            f"{sizes[0] / 2:g} px, {large.mean():.1%} one above {2 * sizes[-1]:g} px"
        ]
        if poor > _POOR_SHARE:
            lines.append(
                "Other MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS, or a larger training image, would fit them "
                "better."
            )
        return lines


def shortened(rows: list[list[Any]]) -> list[list[Any]]:
    """The first and the last of many rows."""
    half = _CLASSES_SHOWN // 2
    if len(rows) <= _CLASSES_SHOWN:
        return rows
    left_out = [f"... {len(rows) - 2 * half} more", *[""] * (len(rows[0]) - 1)]
    return [*rows[:half], left_out, *rows[-half:]]


def best_overlaps(sides: np.ndarray, sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """IoU of each box with the anchor that fits its shape best, one centre for both.

    Args:
        sides: (N, 2) width and height in pixels.
        sizes: roots of the anchors' areas, in pixels.
        ratios: of their height to their width.
    Returns:
        (N,), 0 to 1.
    """
    roots = np.sqrt(np.asarray(ratios, dtype=float))
    shapes = np.stack([np.outer(sizes, 1 / roots).ravel(), np.outer(sizes, roots).ravel()], axis=1)
    common = np.minimum(sides[:, None], shapes[None]).prod(axis=2)
    union = sides.prod(axis=1)[:, None] + shapes.prod(axis=1)[None] - common
    return (common / np.maximum(union, 1e-9)).max(axis=1)
