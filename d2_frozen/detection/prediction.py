"""How a detection head predicts pictures: test size of its config, COCO results, boxes and masks drawn."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_coding
from torch import nn

from d2_frozen.data.transforms import build_augmentations
from d2_frozen.files import write_text
from d2_frozen.tasks import Classes, fill_class_count
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data import transforms as T
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

COCO_FILE = "coco.json"


class DetectionPrediction:
    """See :class:`d2_frozen.tasks.Prediction`. Results are Detectron2's ``{"instances": Instances}``.

    Args:
        cfg: of the head.
        classes: names and category ids of the data; without them, class numbers counted from 1 are both.
    """

    def __init__(self, cfg: CfgNode, classes: Classes | None) -> None:
        self._augmentations = build_augmentations(cfg, is_train=False)
        count = fill_class_count(cfg.MODEL.ROI_HEADS, classes, "MODEL.ROI_HEADS.NUM_CLASSES")
        numbers = list(range(1, count + 1))
        self.classes = classes or Classes([str(number) for number in numbers], numbers)
        self._look = Metadata()
        self._look.set(thing_classes=self.classes.names, thing_colors=distinct_colours(count))

    def testing_model(self, model: nn.Module) -> nn.Module:
        return model

    def compact_model(self, model: nn.Module) -> nn.Module:
        return model

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return resized_by(self._augmentations, height, width)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def compact(self, result: dict[str, Any]) -> dict[str, Any]:
        return {"instances": result["instances"].to("cpu")}

    def record(
        self, result: dict[str, Any], height: int, width: int, folder: Path, name: str
    ) -> dict[str, Any]:
        """{"instances": results in COCO's format, without image ids, with areas}."""
        found = instances_to_coco_json(self.compact(result)["instances"], 0)
        for one in found:
            del one["image_id"]
            one["category_id"] = self.classes.ids[one["category_id"]]
            mask = one.get("segmentation")
            one["area"] = float(mask_coding.area(mask)) if mask else one["bbox"][2] * one["bbox"][3]
        return {"instances": found}

    def draw(self, picture: np.ndarray, result: dict[str, Any], min_score: float) -> np.ndarray:
        found: Instances = self.compact(result)["instances"]
        found = found[found.scores >= min_score]
        artist = Visualizer(picture, self._look, instance_mode=ColorMode.SEGMENTATION)
        return artist.draw_instance_predictions(found).get_image()

    def collect(self, records: Iterable[dict[str, Any]], folder: Path) -> Path | None:
        """COCO's format with "score" in every annotation: the list "annotations" is also a results file's content.

        Frames of videos are images with "video", "frame", "seconds"; their file name is that of the video with the
        number of the frame.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for record in records:
            image = {"id": len(images) + 1, "file_name": record["file"]}
            image |= {"width": record["width"], "height": record["height"]}
            if "frame" in record:
                image["file_name"] = f"{record['file']}/{record['frame']:06d}"
                image |= {"video": record["file"], "frame": record["frame"], "seconds": record["seconds"]}
            images.append(image)
            for one in record["instances"]:
                ids = {"id": len(annotations) + 1, "image_id": image["id"]}
                annotations.append({**ids, **one, "iscrowd": 0})
        categories = [{"id": i, "name": name} for i, name in zip(self.classes.ids, self.classes.names)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        return write_text(folder / COCO_FILE, json.dumps(content))


def resized_by(augmentations: list[T.Augmentation], height: int, width: int) -> tuple[int, int]:
    """(height, width) after the test augmentations, which must be resizes; no side becomes less than a pixel."""
    blank = np.broadcast_to(np.uint8(0), (height, width, 3))  # of no memory
    for augmentation in augmentations:
        transform = augmentation.get_transform(blank)
        if isinstance(transform, T.ResizeTransform):
            height, width = max(1, transform.new_h), max(1, transform.new_w)
            blank = np.broadcast_to(np.uint8(0), (height, width, 3))
        elif not isinstance(transform, T.NoOpTransform):
            raise ValueError(f"a test augmentation is {augmentation}, but prediction knows resizing only.")
    return height, width


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """RGB in 0..255, one per class, the same in every run."""
    # Steps of the golden ratio spread any number of hues.
    hues = [(k * 0.618034) % 1.0 for k in range(count)]
    rgb = [colorsys.hls_to_rgb(hue, 0.55, 0.9) for hue in hues]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in rgb]
