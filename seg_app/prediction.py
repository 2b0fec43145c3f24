"""How a segmentation head predicts pictures: test size of its config, a PNG of class ids, colours over the picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from d2_frozen.detection.prediction import resized_by
from d2_frozen.files import write_bytes
from d2_frozen.tasks import Classes, fill_class_count
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer
from seg_app.data.mapper import build_augmentations
from seg_app.evaluation import LabelModel, sliding_window_of
from seg_app.evaluation.pictures import class_colours

# Scores that a model may give for one picture: 256 Mi numbers, 1 GiB. With 150 classes, that is 1.8 megapixels.
_MAX_SCORES = 1 << 28
_OPACITY = 0.6  # of class colours over the picture


class SegmentationPrediction:
    """See :class:`d2_frozen.tasks.Prediction`. Results are Detectron2's ``{"sem_seg": (K, H, W) scores}``.

    Args:
        cfg: of the head.
        classes: names and the data's label values; without them, class numbers counted from 0 are both.
    """

    def __init__(self, cfg: CfgNode, classes: Classes | None) -> None:
        count = fill_class_count(cfg.MODEL.SEM_SEG_HEAD, classes, "MODEL.SEM_SEG_HEAD.NUM_CLASSES")
        self._cfg = cfg
        self._augmentations = build_augmentations(cfg, is_train=False)
        self.classes = classes or Classes([str(k) for k in range(count)], list(range(count)))
        self._look = Metadata()
        self._look.set(
            stuff_classes=self.classes.names, stuff_colors=class_colours(self.classes.names).tolist()
        )
        self._values = np.array(self.classes.ids)

    def testing_model(self, model: nn.Module) -> nn.Module:
        return sliding_window_of(self._cfg, model)

    def compact_model(self, model: nn.Module) -> nn.Module:
        """Labels at the picture's full size, a few rows at a time, however many scores they come from."""
        return LabelModel(self.testing_model(model))

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return resized_by(self._augmentations, height, width)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """That of the picture, or the largest of its shape whose scores fit into 1 GiB."""
        shrink = math.sqrt(len(self._values) * height * width / _MAX_SCORES)
        if shrink <= 1:
            return height, width
        return max(1, int(height / shrink)), max(1, int(width / shrink))

    def compact(self, result: dict[str, Any]) -> dict[str, Any]:
        """{"labels": (h, w) class numbers}: of 150 classes, a hundredth of the scores' memory."""
        if "labels" in result:
            return result
        dtype = np.uint8 if len(self._values) <= 256 else np.int32
        return {"labels": result["sem_seg"].argmax(dim=0).cpu().numpy().astype(dtype)}

    def record(
        self, result: dict[str, Any], height: int, width: int, folder: Path, name: str
    ) -> dict[str, Any]:
        """{"labels": labels/NAME.png with label values, "pixels": share of each class that is there, by name}."""
        found = _fitted(self.compact(result)["labels"], height, width)
        values = self._values[found]
        dtype = np.uint8 if self._values.max() <= 255 else np.uint16
        buffer = io.BytesIO()
        Image.fromarray(values.astype(dtype)).save(buffer, format="PNG")
        relative = f"labels/{name}.png"
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, buffer.getvalue())
        counts = np.bincount(found.ravel(), minlength=len(self._values))
        shares = {
            self.classes.names[k]: round(float(counts[k]) / found.size, 6) for k in np.flatnonzero(counts)
        }
        return {"labels": relative, "pixels": shares}

    def draw(self, picture: np.ndarray, result: dict[str, Any], min_score: float) -> np.ndarray:
        height, width = picture.shape[:2]
        found = _fitted(self.compact(result)["labels"], height, width)
        return Visualizer(picture, self._look).draw_sem_seg(found, alpha=_OPACITY).get_image()

    def collect(self, records: Iterable[dict[str, Any]], folder: Path) -> Path | None:
        return None  # the PNGs are the format


def _fitted(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) class numbers at another size, by nearest neighbour."""
    if labels.shape == (height, width):
        return labels
    rows = (np.arange(height) * labels.shape[0]) // height
    columns = (np.arange(width) * labels.shape[1]) // width
    return labels[rows[:, None], columns]
