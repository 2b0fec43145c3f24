"""Detectron2's metrics (mIoU, fwIoU, mACC, pACC), a table per class, predicted label maps, the confusion matrix.

Classes without a pixel in the truth have no IoU: they are left out of the means, and are NaN in the table. Pixels of
other classes that are taken for them lower the IoU of those.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from tabulate import tabulate

from d2_frozen.confusion import confusion_picture, mostly_taken_for
from d2_frozen.data.label_maps import read_label_map
from d2_frozen.data.written import file_name_of
from d2_frozen.files import by_the_way, write_bytes
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

logger = logging.getLogger("d2_frozen.seg_app.evaluation")


class LabelMapEvaluator(SemSegEvaluator):
    """``sem_seg``: mIoU and so on, in percent.

    Args:
        dataset_name: a registered dataset with label maps and ``stuff_classes``; ``ignore_label`` is 255 by default.
        output_dir: for sem_seg_predictions.json, predictions/NAME/*.png, confusion_NAME.png; None writes nothing.
        write_predictions: the PNGs. They hold what the data's own label maps hold: ``label_values`` where it has some.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, *, write_predictions: bool = True
    ) -> None:
        facts = MetadataCatalog.get(dataset_name)
        values, ignore_label = facts.get("label_values", None), facts.get("ignore_label", 255)
        facts.ignore_label = ignore_label  # Detectron2's evaluator has no default for it

        def read(path: str, **_: Any) -> np.ndarray:
            return read_label_map(path, values, ignore_label).astype(np.int64)

        super().__init__(dataset_name, distributed=True, output_dir=output_dir, sem_seg_loading_fn=read)
        self._classes: list[str] = list(facts.stuff_classes)
        self._values = np.array(values if values is not None else range(len(self._classes)))
        self._name = dataset_name
        self._prediction_folder = None
        if output_dir and write_predictions:
            self._prediction_folder = Path(output_dir, "predictions", dataset_name)
            files = [record["file_name"] for record in DatasetCatalog.get(dataset_name)]
            self._root = os.path.dirname(os.path.commonprefix(files)) if len(files) > 1 else ""

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """As in Detectron2; writes the PNGs."""
        super().process(inputs, outputs)
        if self._prediction_folder is None:
            return
        for given, output in zip(inputs, outputs):
            labels = self._values[output["sem_seg"].argmax(dim=0).cpu().numpy()]
            name = given["file_name"]
            relative = Path(os.path.relpath(name, self._root) if self._root else os.path.basename(name))
            path = (self._prediction_folder / relative).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            dtype = np.uint8 if self._values.max() <= 255 else np.uint16
            buffer = io.BytesIO()
            Image.fromarray(labels.astype(dtype)).save(buffer, format="PNG")
            write_bytes(path, buffer.getvalue())

    def evaluate(self) -> dict[str, Any] | None:
        """Detectron2's result; logs the table, writes the confusion matrix. None on all processes but the first."""
        results = super().evaluate()
        if results is None:
            return None
        counts = np.asarray(self._conf_matrix)[:-1, :-1].T  # rows: truth, columns: prediction
        logger.info("%s, per class:\n%s", self._name, class_table(self._classes, counts))
        if self._output_dir:
            picture = cv2.imencode(".png", confusion_picture(self._classes, counts)[..., ::-1])[1]
            with by_the_way(f"The picture of {self._name}'s confusions is not written"):
                path = Path(self._output_dir, f"confusion_{file_name_of(self._name)}.png")
                write_bytes(path, picture.tobytes())
        return results


def class_table(classes: Sequence[str], counts: np.ndarray) -> str:
    """One row per class: IoU and accuracy in percent, its share of the truth, what it is mostly taken for.

    Args:
        counts: (K, K) pixels; rows are the truth.
    """
    rows = []
    total = max(int(counts.sum()), 1)
    for k, name in enumerate(classes):
        truth, hits = int(counts[k].sum()), int(counts[k, k])
        if truth == 0:
            rows.append([name, "-", "-", "0", "not in this dataset"])
            continue
        union = truth + int(counts[:, k].sum()) - hits
        rows.append(
            [
                name,
                f"{100 * hits / union:.2f}",
                f"{100 * hits / truth:.2f}",
                f"{100 * truth / total:.2f}",
                mostly_taken_for(classes, counts, k),
            ]
        )
    return tabulate(
        rows,
        headers=["class", "IoU", "ACC", "pixels, %", "mostly taken for"],
        colalign=("left", "right", "right", "right", "left"),
        disable_numparse=True,
    )
