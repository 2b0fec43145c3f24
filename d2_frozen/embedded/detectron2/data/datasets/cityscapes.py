"""How do the folders of Cityscapes become dataset dicts for semantic segmentation?

Layout: https://www.cityscapes-dataset.com; label maps with the 19 training classes are made from the download by
``createTrainIdLabelImgs.py`` of the package cityscapesscripts.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from detectron2._outside import outside_subset
from detectron2.utils.file_io import PathManager

__all__ = ["load_cityscapes_semantic"]

__getattr__ = outside_subset(__name__, ("load_cityscapes_instances",))

logger = logging.getLogger(__name__)

_IMAGE, _LABELS, _POLYGONS = "leftImg8bit.png", "gtFine_labelTrainIds.png", "gtFine_polygons.json"


def load_cityscapes_semantic(image_dir: str, gt_dir: str) -> list[dict[str, Any]]:
    """Pair images with their label maps.

    Args:
        image_dir: e.g. ".../leftImg8bit/train", with a folder per city.
        gt_dir: e.g. ".../gtFine/train", with the same folders.
    Returns:
        Dicts with file_name, sem_seg_file_name, height and width, by city and name.
    Raises:
        FileNotFoundError: no image, or an image without its label map or its json; says which.
    """
    records = []
    for city in sorted(PathManager.ls(image_dir)):
        for image in sorted(PathManager.ls(os.path.join(image_dir, city))):
            if not image.endswith(_IMAGE):
                continue
            stem = os.path.join(gt_dir, city, image.removesuffix(_IMAGE))
            if not PathManager.isfile(stem + _LABELS):
                raise FileNotFoundError(
                    f"{stem + _LABELS} is missing: make it with cityscapesscripts' createTrainIdLabelImgs.py."
                )
            with PathManager.open(stem + _POLYGONS, "rb") as stream:
                size = json.load(stream)
            records.append(
                {
                    "file_name": os.path.join(image_dir, city, image),
                    "sem_seg_file_name": stem + _LABELS,
                    "height": size["imgHeight"],
                    "width": size["imgWidth"],
                }
            )
    if not records:
        raise FileNotFoundError(f"no image *{_IMAGE} in the folders of {image_dir}.")
    logger.info("%s: %d images with label maps.", image_dir, len(records))
    return records
