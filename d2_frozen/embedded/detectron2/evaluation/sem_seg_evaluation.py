"""SemSegEvaluator: intersection over union and accuracy of per-pixel classes.

In: per image ``{"sem_seg": (C, H, W) scores}``.  Out: ``{"sem_seg": {"mIoU": percent, ...}}``.

Everything is read off one confusion matrix over all pixels of all images. Pixels that are ignored in the
ground truth count nowhere.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_coding
import torch
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ._result_files import write_results
from .evaluator import DatasetEvaluator

__all__ = ["SemSegEvaluator", "load_image_into_numpy_array"]

# Width of the boundary band, relative to the image diagonal (Boundary IoU, arXiv:2103.16562, section 4).
_BAND_WIDTH = 0.02
_MOST_CLASSES_WITH_BOUNDARY = 254


def load_image_into_numpy_array(filename: str, copy: bool = False, dtype: Any = None) -> np.ndarray:
    """A label image as (H, W) array; ``copy`` asks for one that can be written to."""
    with PathManager.open(filename, "rb") as handle:
        labels = np.asarray(Image.open(handle), dtype=dtype)
    return labels.copy() if copy else labels


class SemSegEvaluator(DatasetEvaluator):
    """Metrics of semantic segmentation.

    Args:
        dataset_name: registered with dicts of ``file_name`` and ``sem_seg_file_name``; its metadata has
            ``stuff_classes`` and ``ignore_label``.
        distributed: add up the confusion matrices of all processes and evaluate on the first.
        output_dir: where to write ``sem_seg_predictions.json`` and ``sem_seg_evaluation.pth``.
        sem_seg_loading_fn: (file name, dtype=) -> (H, W) labels; by default an image is read.
        num_classes, ignore_label: from the metadata; arguments only for old callers.
    Raises:
        ValueError: ``num_classes`` contradicts the metadata.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        sem_seg_loading_fn: Callable[..., np.ndarray] = load_image_into_numpy_array,
        num_classes: int | None = None,
        ignore_label: int | None = None,
    ) -> None:
        self._logger = logging.getLogger(__name__)
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = output_dir
        self._load_labels = sem_seg_loading_fn
        self._class_names = list(metadata.stuff_classes)
        self._num_classes = len(self._class_names)
        if num_classes is not None and num_classes != self._num_classes:
            raise ValueError(
                f"num_classes={num_classes}, but {dataset_name} has {self._num_classes} stuff_classes."
            )
        self._ignore_label = metadata.ignore_label if ignore_label is None else ignore_label
        self._labels_of = {
            record["file_name"]: record["sem_seg_file_name"] for record in DatasetCatalog.get(dataset_name)
        }
        forward = metadata.get("stuff_dataset_id_to_contiguous_id")
        self._to_dataset_id = None if forward is None else {v: k for k, v in forward.items()}
        self._with_boundary = self._num_classes <= _MOST_CLASSES_WITH_BOUNDARY
        self.reset()

    def reset(self) -> None:
        side = self._num_classes + 1  # the last row and column take what is ignored
        self._conf_matrix = np.zeros((side, side), dtype=np.int64)
        self._b_conf_matrix = np.zeros((side, side), dtype=np.int64)
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Take in one batch.

        Args:
            inputs: dicts with ``file_name``.
            outputs: dicts with ``sem_seg``, (C, H, W) scores at the size of the ground truth.
        Raises:
            ValueError: names the file whose prediction has another size, or whose labels are out of range.
        """
        for given, output in zip(inputs, outputs):
            name = given["file_name"]
            predicted = output["sem_seg"].argmax(dim=0).cpu().numpy().astype(np.int64)
            truth = self._truth(name, predicted.shape)
            self._conf_matrix += self._confusion(predicted, truth)
            if self._with_boundary:
                self._b_conf_matrix += self._confusion(_label_edges(predicted), _label_edges(truth))
            self._predictions += self.encode_json_sem_seg(predicted, name)

    def _truth(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self._labels_of:
            raise ValueError(f"{name} is no image of {self._dataset_name}.")
        labels_file = self._labels_of[name]
        truth = np.array(self._load_labels(labels_file, dtype=int))
        if truth.shape != shape:
            raise ValueError(
                f"{name}: (height, width) is {shape} predicted, but {truth.shape} in {labels_file}."
            )
        truth[truth == self._ignore_label] = self._num_classes
        if truth.min(initial=0) < 0 or truth.max(initial=0) > self._num_classes:
            bad = sorted(set(np.unique(truth)) - set(range(self._num_classes + 1)))
            raise ValueError(
                f"{labels_file} has the labels {', '.join(map(str, bad[:5]))}, but {self._dataset_name} has "
                f"{self._num_classes} classes and ignores {self._ignore_label}."
            )
        return truth

    def _confusion(self, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
        side = self._num_classes + 1
        pairs = side * predicted.ravel().astype(np.int64) + truth.ravel()
        return np.bincount(pairs, minlength=side * side).reshape(side, side)

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """``sem_seg``: mIoU, fwIoU (weighted by how frequent a class is), IoU per class, boundary IoU per
        class, mACC, pACC (all pixels), ACC per class. NaN for classes that the ground truth does not have.
        None on all processes but the first.
        """
        if not self._gather():
            return None
        if self._output_dir:
            path = os.path.join(self._output_dir, "sem_seg_predictions.json")
            write_results(path, lambda stream: stream.write(json.dumps(self._predictions).encode()))
        scores = _Scores(self._conf_matrix)
        edges = _Scores(self._b_conf_matrix) if self._with_boundary else None
        result = {"mIoU": scores.mean_iou, "fwIoU": scores.weighted_iou}
        for k, name in enumerate(self._class_names):
            result[f"IoU-{name}"] = scores.iou[k]
            if edges is not None:
                result[f"BoundaryIoU-{name}"] = edges.iou[k]
                result[f"min(IoU, B-Iou)-{name}"] = np.minimum(scores.iou[k], edges.iou[k])
        result |= {"mACC": scores.mean_accuracy, "pACC": scores.pixel_accuracy}
        result |= {f"ACC-{name}": scores.accuracy[k] for k, name in enumerate(self._class_names)}
        result = {name: 100 * float(value) for name, value in result.items()}
        if self._output_dir:
            path = os.path.join(self._output_dir, "sem_seg_evaluation.pth")
            write_results(path, lambda stream: torch.save(result, stream))
        results = OrderedDict(sem_seg=result)
        self._logger.info(results)
        return results

    def _gather(self) -> bool:
        """Bring all processes' counts together; True on the process that evaluates."""
        if not self._distributed:
            return True
        comm.synchronize()
        mine = (self._conf_matrix, self._b_conf_matrix, self._predictions)
        parts = comm.gather(mine, dst=0)
        if not comm.is_main_process():
            return False
        self._conf_matrix = sum(part[0] for part in parts)
        self._b_conf_matrix = sum(part[1] for part in parts)
        self._predictions = list(itertools.chain.from_iterable(part[2] for part in parts))
        return True

    def encode_json_sem_seg(self, sem_seg: np.ndarray, input_file_name: str) -> list[dict[str, Any]]:
        """(H, W) classes -> one dict per class in the image, in the format of COCO's stuff challenge."""
        rows = []
        for label in np.unique(sem_seg).tolist():
            code = mask_coding.encode(np.asfortranarray(sem_seg == label, dtype=np.uint8))
            code["counts"] = code["counts"].decode("ascii")
            category = label if self._to_dataset_id is None else self._to_dataset_id[label]
            rows.append({"file_name": input_file_name, "category_id": category, "segmentation": code})
        return rows


class _Scores:
    """All metrics of one confusion matrix: rows predicted, columns truth, the last of each ignored."""

    def __init__(self, matrix: np.ndarray) -> None:
        counted = matrix[:-1, :-1].astype(np.float64)
        hits = np.diagonal(counted)
        in_truth, in_prediction = counted.sum(axis=0), counted.sum(axis=1)
        present = in_truth > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            self.accuracy = np.where(present, hits / in_truth, np.nan)
            self.iou = np.where(present, hits / (in_truth + in_prediction - hits), np.nan)
            frequency = in_truth / in_truth.sum()
            self.mean_accuracy = self.accuracy[present].sum() / present.sum()
            self.mean_iou = self.iou[present].sum() / present.sum()
            self.weighted_iou = (self.iou[present] * frequency[present]).sum() if present.any() else np.nan
            self.pixel_accuracy = hits.sum() / in_truth.sum()


def _label_edges(labels: np.ndarray) -> np.ndarray:
    """(H, W) labels -> the band along label borders, as Detectron2 measures it, so that the numbers compare.

    The band is the label map minus its erosion (the lowest label in reach, 0 beyond the image). It equals the
    boundary of the Boundary IoU paper for background 0 and one other class; between two classes it holds
    their difference.
    """
    height, width = labels.shape
    reach = max(1, round(_BAND_WIDTH * float(np.hypot(height, width))))
    levels = cv2.copyMakeBorder(labels.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    lowest = cv2.erode(levels, np.ones((3, 3), np.uint8), iterations=reach)
    return (levels - lowest)[1:-1, 1:-1]
