"""ADE20K with 150 classes, under the names, and in the layout, that Detectron2 gives it.

DETECTRON2_DATASETS/ADEChallengeData2016/{images,annotations_detectron2}/{training,validation}; ``python -m
seg_app.prepare ade20k`` makes it from the official release.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg

FOLDER = "ADEChallengeData2016"
SPLITS = {"ade20k_sem_seg_train": "training", "ade20k_sem_seg_val": "validation"}
IMAGES = {"training": 20210, "validation": 2000}


def class_names() -> list[str]:
    """The 150 names in the order of ids, as Detectron2 writes them."""
    return (Path(__file__).parent / "ade20k_classes.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")


def datasets_root() -> str:
    """DETECTRON2_DATASETS, "datasets" where it is not set."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def _register() -> None:
    for name, split in SPLITS.items():
        if name in DatasetCatalog.list():
            continue  # by an installed Detectron2
        images, labels = (
            os.path.join(datasets_root(), FOLDER, part, split)
            for part in ("images", "annotations_detectron2")
        )
        DatasetCatalog.register(name, partial(load_sem_seg, labels, images))
        MetadataCatalog.get(name).set(
            stuff_classes=class_names(),
            image_root=images,
            sem_seg_root=labels,
            evaluator_type="sem_seg",
            ignore_label=255,
        )


_register()
