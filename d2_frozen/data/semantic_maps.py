"""Has every training image the semantic label map that HTC's semantic branch learns from, and can it?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from d2_frozen.data.checks import AUTO_FULL_UP_TO, look_at_files
from d2_frozen.data.label_maps import LabelMapError, check_map_size, check_map_values, read_label_map
from d2_frozen.data.label_values import values_of
from d2_frozen.data.problems import BadDataError, Problem
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog


def check_semantic_maps(cfg: CfgNode) -> None:
    """With MODEL.HTC.SEMANTIC_ON, look for the label map of every image of DATASETS.TRAIN, and into those of sets whose
    images DATASETS.CHECK_IMAGES decodes.

    Raises:
        ValueError: a record names no map.
        FileNotFoundError: there is no such file.
        BadDataError: maps with labels that are no classes, which no sample may have; of another size than the image, or
            no maps, which DATASETS.SKIP_BAD replaces while training.
    """
    if not cfg.MODEL.HTC.SEMANTIC_ON or not cfg.MODEL.ROI_HEADS.NAME.endswith("HTCROIHeads"):
        return
    problems: list[Problem] = []
    for name in cfg.DATASETS.TRAIN:
        records = DatasetCatalog.get(name)
        for record in records:
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
        wanted = cfg.DATASETS.CHECK_IMAGES
        if wanted == "full" or (wanted == "auto" and len(records) <= AUTO_FULL_UP_TO):
            problems += _faults(cfg, name, records)
    if problems and not (cfg.DATASETS.SKIP_BAD and all(problem.skippable for problem in problems)):
        raise BadDataError(problems)


def _faults(cfg: CfgNode, name: str, records: Sequence[dict[str, Any]]) -> list[Problem]:
    classes, ignored = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    allowed = f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {classes}, and IGNORE_VALUE {ignored}"

    def look(record: dict[str, Any]) -> Problem | None:
        path = record["sem_seg_file_name"]
        where = f"{name}: image {record.get('image_id', '?')!r}"
        try:
            labels = read_label_map(path)
            height, width = labels.shape
            check_map_size(path, (width, height), (record.get("width", width), record.get("height", height)))
        except LabelMapError as err:
            return Problem(err.kind, where, err.seen)
        try:
            check_map_values(path, values_of(labels), classes, ignored, allowed)
        except LabelMapError as err:
            return Problem(err.kind, where, err.seen, skippable=False)
        return None

    return [problem for problem in look_at_files(look, records) if problem]
