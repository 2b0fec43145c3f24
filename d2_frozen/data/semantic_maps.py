"""Has every training image the semantic label map that HTC's semantic branch learns from?"""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog


def check_semantic_maps(cfg: CfgNode) -> None:
    """With MODEL.HTC.SEMANTIC_ON, look for the label map of every image of DATASETS.TRAIN; contents are not read.

    Raises:
        ValueError: a record names no map.
        FileNotFoundError: there is no such file.
    """
    if not cfg.MODEL.HTC.SEMANTIC_ON or not cfg.MODEL.ROI_HEADS.NAME.endswith("HTCROIHeads"):
        return
    for name in cfg.DATASETS.TRAIN:
        for record in DatasetCatalog.get(name):
            place = f"{name}: image {record.get('image_id', '?')!r}, {record.get('file_name')}"
            path = record.get("sem_seg_file_name")
            if path is None:
                raise ValueError(
                    f"{place}: MODEL.HTC.SEMANTIC_ON is True, but the dataset has no semantic label maps. Name their "
                    "folder in the field sem_seg of its DATASETS.REGISTER entry, or set SEMANTIC_ON to False."
                )
            if "://" not in path and not os.path.isfile(path):
                raise FileNotFoundError(
                    f"{place}: no semantic label map at {path} (MODEL.HTC.SEMANTIC_ON is True)."
                )
