"""Picture sheets: what is labelled on the left, what the model finds on the right; or what is labelled alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from d2_frozen.data import build_test_loader
from d2_frozen.data.written import file_name_of
from d2_frozen.files import write_bytes
from d2_frozen.lettering import put_text, text_width
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

_ROW_HEIGHT_PX = 320
_COLUMNS = 3


def write_prediction_sheet(
    cfg: CfgNode, model: nn.Module, dataset_name: str, count: int, score_threshold: float = 0.5
) -> Path | None:
    """Predict ``count`` images spread over a dataset and write one picture beside the ground truth.

    Args:
        cfg: for the loader and OUTPUT_DIR.
        model: in any mode; it is left in the mode it came in.
        dataset_name: a registered dataset with annotations.
        count: number of images; 0 writes nothing.
        score_threshold: detections below it are not drawn.
    Returns:
        Path of ``OUTPUT_DIR/inference/predictions_NAME.jpg``, or None.
    """
    metadata = MetadataCatalog.get(dataset_name)
    truth = {record["file_name"]: record for record in DatasetCatalog.get(dataset_name)}

    def pair(item: dict, result: dict) -> np.ndarray:
        found = result["instances"].to("cpu")
        return _pair(truth[item["file_name"]], found[found.scores >= score_threshold], metadata)

    pairs = predicted_pairs(
        model, len(truth), count, lambda indices: build_test_loader(cfg, dataset_name, indices=indices), pair
    )
    return write_sheet(predictions_path(cfg, dataset_name), pairs)


def predicted_pairs(
    model: nn.Module,
    images: int,
    count: int,
    loader: Callable[[list[int]], Iterable[list[dict]]],
    pair: Callable[[dict, dict], np.ndarray],
) -> list[np.ndarray]:
    """Pictures of truth and prediction, of ``count`` images spread over a dataset.

    Args:
        model: in any mode; it is left in the mode it came in.
        images: how many there are.
        loader: of the images with these indices, one per batch.
        pair: (input of the model, its result) -> (h, w, 3) uint8 RGB.
    """
    if count <= 0 or not images:
        return []
    wanted = spread(images, count)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [pair(batch[0], model(batch)[0]) for batch in loader(wanted)]
    finally:
        model.train(was_training)


def spread(images: int, count: int) -> list[int]:
    """``count`` indices spread over as many images; all of them where there are fewer."""
    return sorted({int(i) for i in np.linspace(0, images - 1, min(count, images))}) if images else []


def predictions_path(cfg: CfgNode, dataset_name: str) -> Path:
    """``OUTPUT_DIR/inference/predictions_NAME.jpg``."""
    return Path(cfg.OUTPUT_DIR, "inference", f"predictions_{file_name_of(dataset_name)}.jpg")


def write_sheet(path: Path, pictures: list[np.ndarray]) -> Path | None:
    """All pictures, (h, w, 3) uint8 RGB, in one JPEG; None where there are none."""
    if not pictures:
        return None
    os.makedirs(path.parent, exist_ok=True)
    code = cv2.imencode(".jpg", _grid(pictures)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return write_bytes(path, code.tobytes())


def _pair(record: dict, instances: Instances, metadata: Metadata) -> np.ndarray:
    """Truth and prediction side by side, (h, w, 3) uint8 RGB."""
    right = Visualizer(utils.read_image(record["file_name"], format="RGB"), metadata)
    return beside(labelled(record, metadata), right.draw_instance_predictions(instances).get_image())


def labelled(record: dict, metadata: Metadata) -> np.ndarray:
    """The image of a record with its boxes and masks, (H, W, 3) uint8 RGB."""
    image = utils.read_image(record["file_name"], format="RGB")
    # Detectors here find none, and not every engine draws them.
    annotations = [
        {k: v for k, v in one.items() if k != "keypoints"} for one in record.get("annotations", ())
    ]
    return Visualizer(image, metadata).draw_dataset_dict({**record, "annotations": annotations}).get_image()


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures of one image, (h, w, 3) uint8 RGB, with the captions "labelled" and "predicted"."""
    halves = [captioned(left, "labelled"), captioned(right, "predicted")]
    gap = np.full((halves[0].shape[0], 4, 3), 255, np.uint8)
    return np.hstack([halves[0], gap, halves[1]])


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """A picture of 320 px in height with a line of text above, of which the end is shown where it is too long."""
    h, w = image.shape[:2]
    size = (max(1, round(w * _ROW_HEIGHT_PX / h)), _ROW_HEIGHT_PX)
    scaled = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
    band = np.full((22, size[0], 3), 255, np.uint8)
    while text and text_width(text, 14) > size[0] - 8:
        text = text[1:]
    put_text(band, text, (4, 16), 14, (60, 60, 60))
    return np.vstack([band, scaled])


def _grid(pairs: list[np.ndarray]) -> np.ndarray:
    """Rows of ``_COLUMNS`` pairs; each column as wide as its widest pair."""
    margin = 8
    rows = [pairs[i : i + _COLUMNS] for i in range(0, len(pairs), _COLUMNS)]
    columns = zip_longest(*rows)
    widths = [max(pair.shape[1] for pair in column if pair is not None) + 2 * margin for column in columns]
    height = max(pair.shape[0] for pair in pairs) + 2 * margin
    sheet = np.full((len(rows) * height, sum(widths), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, pair in enumerate(row):
            y, x = r * height + margin, sum(widths[:c]) + margin
            sheet[y : y + pair.shape[0], x : x + pair.shape[1]] = pair
    return sheet
