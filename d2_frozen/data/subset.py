"""Which images are the 1 % of a low-data experiment? The same ones for everyone who gives the same seed.

In: DATASETS.SUBSET and the records of DATASETS.TRAIN.  Out: the records to train on, and a file with their ids.
Every image has a rank, the SHA-256 of the seed and its id; a subset is the first of them by rank. So it does not
depend on the order in a file, platform or library versions, and 1 % is a part of 10 %.
Source: arXiv 2211.02043, Table 6. Its text says 12K images for 1 % of COCO; 1 % of 117,266 is 1,173.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from d2_frozen.data.written import write_about
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import print_instances_class_histogram
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.utils import comm

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def training_records(cfg: CfgNode) -> Sequence[Record]:
    """Records of DATASETS.TRAIN, of each set the share that DATASETS.SUBSET names.

    The percentage is of the images that would train without it: with DATALOADER.FILTER_EMPTY_ANNOTATIONS those
    with objects (117,266 of COCO train2017's 118,287), else all. What is taken is logged and written to
    OUTPUT_DIR/data/NAME.subset.json.

    Raises:
        ValueError: see ``check_subset``.
    """
    check_subset(cfg)
    names = list(cfg.DATASETS.TRAIN)
    kept: dict[str, Any] = {"filter_empty": cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS}
    if cfg.MODEL.KEYPOINT_ON:
        kept["min_keypoints"] = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    if cfg.DATASETS.SUBSET.PERCENT == 100:
        return get_detection_dataset_dicts(names, **kept)
    records: list[Record] = []
    for name in names:
        whole = get_detection_dataset_dicts([name], check_consistency=False, **kept)
        part = take_subset(whole, cfg.DATASETS.SUBSET.PERCENT, cfg.DATASETS.SUBSET.SEED)
        _report(cfg, name, part, len(whole))
        records += part
    class_names = MetadataCatalog.get(names[0]).get("thing_classes", None)
    if class_names is not None and "annotations" in records[0]:
        check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(records, class_names)
    return records


def check_subset(cfg: CfgNode) -> None:
    """Are the values of DATASETS.SUBSET possible?

    Raises:
        ValueError: PERCENT is not above 0 and at most 100.
    """
    percent = cfg.DATASETS.SUBSET.PERCENT
    if not (math.isfinite(percent) and 0 < percent <= 100):
        raise ValueError(
            f"DATASETS.SUBSET.PERCENT is {percent}; it must be above 0 and at most 100 (all images)."
        )


def take_subset(records: Sequence[Record], percent: float, seed: int) -> list[Record]:
    """The first ``percent`` of the records by rank, rounded to the nearest count, at least one.

    Args:
        records: of one dataset. The ``image_id`` is what an image is known by; where there is none, its file
            name, relative to the folder that all of them share.
        percent: above 0, at most 100.
    Returns:
        In the order of rank: whatever the order of ``records``, the result is the same list.
    """
    if not records:
        return []
    folder = os.path.dirname(os.path.commonprefix([os.path.abspath(r.get("file_name", "")) for r in records]))

    def rank(record: Record) -> tuple[str, str]:
        key = record.get("image_id")
        if key is None:
            key = os.path.relpath(os.path.abspath(record["file_name"]), folder).replace(os.sep, "/")
        return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest(), str(record.get("file_name", ""))

    return sorted(records, key=rank)[: max(1, round(len(records) * percent / 100))]


def _report(cfg: CfgNode, name: str, part: Sequence[Record], of: int) -> None:
    if not comm.is_main_process():
        return
    subset = cfg.DATASETS.SUBSET
    absent, objects = _classes_without_objects(name, part)
    document = {
        "dataset": name,
        "percent": subset.PERCENT,
        "seed": subset.SEED,
        "images": len(part),
        "of": of,
        "objects": objects,
        "classes_without_objects": absent,
        # In the order of rank: the first ones are any smaller subset of the same seed.
        "ids": [record.get("image_id", record.get("file_name")) for record in part],
    }
    path = write_about(cfg, name, document, suffix=".subset.json")
    has_objects = any("annotations" in record for record in part)  # label maps are not counted
    logger.info(
        "DATASETS.SUBSET: %s trains on %d of %d images (%g %%, seed %d)%s; ids in %s.",
        name, len(part), of, subset.PERCENT, subset.SEED, f" with {objects} objects" * has_objects, path,
    )  # fmt: skip
    if absent:
        logger.warning(
            "DATASETS.SUBSET: these images of %s have no object of %d classes: %s.",
            name, len(absent), ", ".join(absent),
        )  # fmt: skip


def _classes_without_objects(name: str, records: Sequence[Record]) -> tuple[list[str], int]:
    """(class names that no annotation has, number of annotations); crowds do not count."""
    counts = Counter(
        annotation["category_id"]
        for record in records
        for annotation in record.get("annotations", ())
        if not annotation.get("iscrowd", 0)
    )
    known = MetadataCatalog.get(name).get("thing_classes", None) or []
    labelled = any("annotations" in record for record in records)
    absent = [label for index, label in enumerate(known) if not counts[index]] if labelled else []
    return absent, sum(counts.values())
