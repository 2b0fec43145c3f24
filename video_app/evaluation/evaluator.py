"""Top-1, top-5 and mean class accuracy, a table per class, the confusion matrix, the five best classes per video.

A video without scores (a bad file) counts as wrong in every metric, and so does one whose scores are not numbers. Where
classes have equal scores, the one with the lower number comes first.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from tabulate import tabulate

from d2_frozen.confusion import confusion_picture, mostly_taken_for
from d2_frozen.data.written import file_name_of
from d2_frozen.files import by_the_way, write_bytes
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from video_app.data.lists import only_numbered

logger = logging.getLogger("d2_frozen.video_app.evaluation")

_BEST = 5


class _Seen(NamedTuple):
    """What is kept of a video: small, since the processes send it to the first one."""

    file_name: str
    label: int
    best: list[int]  # up to _BEST classes, the most likely first; empty for a bad video
    scores: list[float]  # of these
    bad: str  # why there are no scores; "" where there are


class TopKEvaluator(DatasetEvaluator):
    """``video``: top1, top5 and mean_class_acc in percent, and ``bad``, how many videos had no scores.

    The mean over classes is over those that the dataset has videos of. Top-5 of five classes or fewer is what is left
    without bad videos.

    Args:
        dataset_name: a registered dataset; ``classes`` in its metadata are their names.
        output_dir: for predictions_NAME.jsonl and confusion_NAME.png; None writes nothing.
        distributed: each process has seen a part of the dataset, and the first evaluates all of it.
        num_classes: of the model, as of :func:`class_names`.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        distributed: bool = True,
        num_classes: int = 0,
    ) -> None:
        self._name = dataset_name
        self._classes = class_names(dataset_name, num_classes)
        self._output_dir = output_dir
        self._distributed = distributed
        self._seen: dict[int, _Seen] = {}

    def reset(self) -> None:
        """Forget all videos."""
        self._seen = {}

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take in a batch. A video that comes twice (a sampler that pads) counts once.

        Args:
            inputs: dicts with ``file_name``, ``label``, ``video_id``, and ``bad`` where the file could not be read.
            outputs: {"scores": (K,) probabilities} each, or {"scores": None} for a bad one.
        Raises:
            ValueError: the number of scores is not that of the classes, or a label is not one of them.
        """
        for given, output in zip(inputs, outputs):
            self._seen[int(given["video_id"])] = self._judged(given, output["scores"])

    def _judged(self, given: dict[str, Any], scores: torch.Tensor | None) -> _Seen:
        name, label = str(given["file_name"]), int(given["label"])
        if not 0 <= label < len(self._classes):
            raise ValueError(f"{name}: label {label}, but {self._name} has {len(self._classes)} classes.")
        if scores is None:
            return _Seen(name, label, [], [], str(given.get("bad") or "no scores"))
        if tuple(scores.shape) != (len(self._classes),):
            raise ValueError(
                f"{name}: scores of shape {tuple(scores.shape)}, but {self._name} has {len(self._classes)} classes. "
                "Its classes must be those that the model was trained on."
            )
        if not torch.isfinite(scores).all():
            return _Seen(name, label, [], [], "scores are not numbers")
        ordered, best = scores.detach().float().cpu().sort(descending=True, stable=True)
        return _Seen(name, label, best[:_BEST].tolist(), ordered[:_BEST].tolist(), "")

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Compute, log the table, write the files. None on all processes but the first; {} if nothing was seen."""
        seen = self._gathered()
        if seen is None:
            return None
        if not seen:
            logger.warning("%s: no video was evaluated.", self._name)
            return {}
        videos = [seen[number] for number in sorted(seen)]
        counts, totals = (
            confusion_counts(videos, len(self._classes)),
            class_totals(videos, len(self._classes)),
        )
        present = totals > 0
        bad = sum(bool(video.bad) for video in videos)
        results = {
            "top1": 100 * float(np.mean([video.best[:1] == [video.label] for video in videos])),
            "top5": 100 * float(np.mean([video.label in video.best for video in videos])),
            "mean_class_acc": 100 * float(np.mean(counts.diagonal()[present] / totals[present])),
            "bad": bad,
        }
        if bad:
            example = next(video for video in videos if video.bad)
            logger.warning(
                "%s: %d of %d videos have no scores and count as wrong, the first %s: %s",
                *(self._name, bad, len(videos), example.file_name, example.bad),
            )
        logger.info("%s, per class:\n%s", self._name, class_table(self._classes, counts, totals))
        if self._output_dir:
            self._write(sorted(seen), videos, counts)
        return {"video": results}

    def _gathered(self) -> dict[int, _Seen] | None:
        """Videos of all processes by their number; None on all but the first."""
        if not self._distributed or comm.get_world_size() == 1:
            return self._seen
        comm.synchronize()
        parts = comm.gather(self._seen, dst=0)
        return {k: v for part in parts for k, v in part.items()} if comm.is_main_process() else None

    def _write(self, numbers: Sequence[int], videos: Sequence[_Seen], counts: np.ndarray) -> None:
        assert self._output_dir is not None
        lines = [json.dumps(self._document(number, video)) + "\n" for number, video in zip(numbers, videos)]
        picture = confusion_picture(self._classes, counts)[..., ::-1]
        with by_the_way(f"Predictions and confusions of {self._name} are not written"):
            os.makedirs(self._output_dir, exist_ok=True)
            write_bytes(
                Path(self._output_dir, f"predictions_{file_name_of(self._name)}.jsonl"),
                "".join(lines).encode(),
            )
            write_bytes(
                Path(self._output_dir, f"confusion_{file_name_of(self._name)}.png"),
                cv2.imencode(".png", picture)[1].tobytes(),
            )

    def _document(self, number: int, video: _Seen) -> dict[str, Any]:
        best = [
            {"label": k, "class": self._classes[k], "score": score}
            for k, score in zip(video.best, video.scores)
        ]
        document = {
            "file": video.file_name,
            "video_id": number,
            "label": video.label,
            "class": self._classes[video.label],
            "top5": best,
        }
        return {**document, "bad": video.bad} if video.bad else document


def class_names(dataset_name: str, num_classes: int = 0) -> list[str]:
    """Names of a registered dataset's classes; it is loaded if it has not been.

    Args:
        num_classes: of the model. A list of numbers without names has classes up to its highest label, and gets those
            that it has no video of; a dataset that says nothing of its classes gets all of them, by number.
    """
    facts = MetadataCatalog.get(dataset_name)
    if facts.get("classes", None) is None:
        DatasetCatalog.get(dataset_name)
    names = [str(name) for name in facts.get("classes", None) or ()]
    if only_numbered(names):
        names += [str(label) for label in range(len(names), num_classes)]
    return names


def confusion_counts(videos: Sequence[_Seen], classes: int) -> np.ndarray:
    """(K, K) int64 numbers of videos, without bad ones; rows are the truth, columns what is found most likely."""
    counts = np.zeros((classes, classes), np.int64)
    for video in videos:
        if video.best:
            counts[video.label, video.best[0]] += 1
    return counts


def class_totals(videos: Sequence[_Seen], classes: int) -> np.ndarray:
    """(K,) int64 numbers of videos, bad ones too."""
    return np.bincount([video.label for video in videos], minlength=classes)


def class_table(classes: Sequence[str], counts: np.ndarray, totals: np.ndarray) -> str:
    """One row per class: its videos, how many percent of them are right, and what it is mostly taken for.

    Args:
        counts: as of ``confusion_counts``.
        totals: as of ``class_totals``.
    """
    rows = []
    for k, name in enumerate(classes):
        accuracy = f"{100 * counts[k, k] / totals[k]:.2f}" if totals[k] else "-"
        mostly = mostly_taken_for(classes, counts, k) if totals[k] else "not in this dataset"
        rows.append([name, str(totals[k]), accuracy, mostly])
    return tabulate(
        rows,
        headers=["class", "videos", "top-1, %", "mostly taken for"],
        colalign=("left", "right", "right", "left"),
        disable_numparse=True,
    )
