"""Pictures of label maps: truth and prediction laid over the image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import nn

from d2_frozen.data import build_test_loader
from d2_frozen.data.label_maps import read_label_map
from d2_frozen.detection.pictures import beside, predicted_pairs, predictions_path, write_sheet
from d2_frozen.lettering import put_text, text_width
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import detection_utils as utils
from seg_app.data.mapper import SegmentationMapper
from seg_app.evaluation.inference import LabelModel, sliding_window_of

_OPACITY = 0.6
_LEGEND_CLASSES = 8


def write_prediction_sheet(cfg: CfgNode, model: nn.Module, dataset_name: str, count: int) -> Path | None:
    """Predict ``count`` images spread over a dataset and write one picture beside the ground truth.

    Returns:
        Path of ``OUTPUT_DIR/inference/predictions_NAME.jpg``, or None for a count of 0.
    """
    records = {record["file_name"]: record for record in DatasetCatalog.get(dataset_name)}
    facts = MetadataCatalog.get(dataset_name)
    colours = class_colours(facts.stuff_classes, facts.get("stuff_colors", None))

    def pair(item: dict[str, Any], result: dict[str, Any]) -> np.ndarray:
        record = records[item["file_name"]]
        image = utils.read_image(record["file_name"], format="RGB")
        truth = true_labels(record, facts)
        found = result["sem_seg"].argmax(dim=0).cpu().numpy()
        halves = beside(overlay(image, truth, colours), overlay(image, found, colours))
        return np.vstack([halves, legend(facts.stuff_classes, colours, [truth, found], halves.shape[1])])

    mapper = SegmentationMapper.from_config(cfg, is_train=False)
    pairs = predicted_pairs(
        LabelModel(sliding_window_of(cfg, model)),
        len(records),
        count,
        lambda indices: build_test_loader(cfg, dataset_name, mapper=mapper, indices=indices),
        pair,
    )
    return write_sheet(predictions_path(cfg, dataset_name), pairs)


def true_labels(record: dict[str, Any], facts: Metadata) -> np.ndarray:
    """(H, W) class ids of a record, or its data's ignore label."""
    ignore_label = record.get("ignore_label", facts.get("ignore_label", 255))
    return read_label_map(record["sem_seg_file_name"], record.get("label_values"), ignore_label)


def class_colours(classes: Sequence[str], given: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """(K, 3) uint8 RGB, the data's own or clearly different hues."""
    if given is not None:
        return np.array(given, dtype=np.uint8)
    # Steps of the golden ratio spread any number of hues; lightness tells neighbours apart.
    hues = (np.arange(len(classes)) * 0.618034) % 1.0
    rgb = [colorsys.hls_to_rgb(hue, (0.5, 0.65, 0.35)[k % 3], 0.85) for k, hue in enumerate(hues)]
    return (np.array(rgb) * 255).round().astype(np.uint8)


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Class colours over an image, (H, W, 3) uint8 RGB; what is no class stays as it is."""
    known = (labels >= 0) & (labels < len(colours))
    painted = image.astype(np.float32)
    painted[known] += _OPACITY * (colours[labels[known]] - painted[known])
    return painted.round().astype(np.uint8)


def legend(classes: Sequence[str], colours: np.ndarray, maps: Sequence[np.ndarray], width: int) -> np.ndarray:
    """The most frequent classes of label maps, by name: (20, width, 3)."""
    labels = np.concatenate([labels.ravel() for labels in maps])
    counts = np.bincount(labels[(labels >= 0) & (labels < len(classes))], minlength=len(classes))
    band = np.full((20, width, 3), 255, np.uint8)
    x = 4
    for k in np.argsort(-counts, kind="stable")[:_LEGEND_CLASSES]:
        name = str(classes[k]).split(",")[0].strip()
        x1 = x + 22 + text_width(name, 11)
        if counts[k] == 0 or x1 > width:
            break
        cv2.rectangle(band, (x, 5), (x + 10, 15), colours[k].tolist(), -1)
        put_text(band, name, (x + 14, 14), 11, (60, 60, 60))
        x = x1
    return band
