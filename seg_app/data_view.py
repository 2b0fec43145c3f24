"""Label maps as pictures, and how much of the training samples each class covers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from d2_frozen.detection.data_view import shortened
from d2_frozen.detection.pictures import captioned, spread
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from seg_app.data.prepare import classes_of
from seg_app.evaluation.pictures import class_colours, legend, overlay, true_labels


class SegmentationData:
    """See :class:`d2_frozen.tasks.DataView`."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def labelled(self, dataset_name: str, count: int) -> list[np.ndarray]:
        records = DatasetCatalog.get(dataset_name)
        facts = MetadataCatalog.get(dataset_name)
        pictures = []
        for record in [records[i] for i in spread(len(records), count)]:
            image = utils.read_image(record["file_name"], format="RGB")
            pictures.append(
                self._picture(dataset_name, image, true_labels(record, facts), record["file_name"])
            )
        return pictures

    def sample(self, sample: dict[str, Any]) -> list[np.ndarray]:
        pixels = utils.convert_image_to_rgb(sample["image"].permute(1, 2, 0), self.cfg.INPUT.FORMAT)
        name = self.cfg.DATASETS.TRAIN[0]
        return [self._picture(name, np.asarray(pixels), sample["sem_seg"].numpy(), sample["file_name"])]

    def dataset_facts(self, dataset_name: str) -> str:
        classes = self._classes(dataset_name)
        return f"{dataset_name}: {len(DatasetCatalog.get(dataset_name))} images, {len(classes)} classes"

    def sample_facts(self, samples: Sequence[dict[str, Any]]) -> str:
        classes = self._classes(self.cfg.DATASETS.TRAIN[0])
        ignored = self.cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        pixels, samples_with, unlabelled, everything = (
            np.zeros(len(classes)),
            np.zeros(len(classes), int),
            0,
            0,
        )
        for sample in samples:
            labels = sample["sem_seg"].numpy()
            counts = np.bincount(labels[labels != ignored].ravel(), minlength=len(classes))[: len(classes)]
            pixels += counts
            samples_with += counts > 0
            unlabelled += int((labels == ignored).sum())
            everything += labels.size
        line = f"{len(samples)} training samples; {unlabelled / max(everything, 1):.1%} of their pixels are ignored"
        order = sorted(range(len(classes)), key=lambda k: (-pixels[k], k))
        rows = [[classes[k], f"{pixels[k] / max(everything, 1):.2%}", int(samples_with[k])] for k in order]
        return "\n".join(
            [
                line,
                tabulate(
                    shortened(rows),
                    headers=["class", "pixels", "samples"],
                    colalign=("left", "right", "right"),
                ),
            ]
        )

    def _picture(self, dataset_name: str, image: np.ndarray, labels: np.ndarray, file: str) -> np.ndarray:
        classes = self._classes(dataset_name)
        colours = class_colours(classes, MetadataCatalog.get(dataset_name).get("stuff_colors", None))
        picture = captioned(overlay(image, labels, colours), Path(file).name)
        return np.vstack([picture, legend(classes, colours, [labels], picture.shape[1])])

    def _classes(self, dataset_name: str) -> list[str]:
        """Names; their numbers where the data has none, and only the config their count."""
        found = classes_of(dataset_name)
        return found.names if found else [str(k) for k in range(self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)]
