"""Which datasets are registered under which names, and where are their files?

Paths are relative to the folder in the environment variable ``DETECTRON2_DATASETS`` ("./datasets" without
it), laid out as Detectron2's documentation says; nothing is read before a dataset is asked for.
"""

from __future__ import annotations

import os
from functools import partial

from detectron2._outside import outside_subset

from ..catalog import DatasetCatalog, MetadataCatalog
from .builtin_meta import _get_builtin_metadata
from .cityscapes import load_cityscapes_semantic
from .coco import register_coco_instances

__all__ = ["register_all_cityscapes", "register_all_coco"]

__getattr__ = outside_subset(
    __name__,
    (
        "register_all_ade20k",
        "register_all_lvis",
        "register_all_pascal_voc",
    ),
)

_COCO_ANNOTATIONS = "coco/annotations"
# name: (images, annotations in coco/annotations)
_COCO_SPLITS = {
    "coco_2014_train": ("coco/train2014", "instances_train2014.json"),
    "coco_2014_val": ("coco/val2014", "instances_val2014.json"),
    "coco_2014_minival": ("coco/val2014", "instances_minival2014.json"),
    "coco_2014_valminusminival": ("coco/val2014", "instances_valminusminival2014.json"),
    "coco_2017_train": ("coco/train2017", "instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", "instances_val2017.json"),
    "coco_2017_test": ("coco/test2017", "image_info_test2017.json"),
    "coco_2017_test-dev": ("coco/test2017", "image_info_test-dev2017.json"),
    "coco_2017_val_100": ("coco/val2017", "instances_val2017_100.json"),
}


def register_all_coco(root: str) -> None:
    """Register COCO 2014 and 2017 below ``root``: objects, and persons with keypoints."""
    for name, (images, json_name) in _COCO_SPLITS.items():
        image_root = os.path.join(root, images)
        json_file = os.path.join(root, _COCO_ANNOTATIONS, json_name)
        register_coco_instances(name, _get_builtin_metadata("coco"), json_file, image_root)
        if json_name.startswith("instances_"):
            persons = json_file.replace("instances_", "person_keypoints_")
            metadata = _get_builtin_metadata("coco_person")
            register_coco_instances("keypoints_" + name, metadata, persons, image_root)


def register_all_cityscapes(root: str) -> None:
    """Register the fine semantic labels of Cityscapes below ``root``; its instances are outside the subset."""
    for split in ("train", "val", "test"):
        image_dir, gt_dir = (
            os.path.join(root, "cityscapes", kind, split, "") for kind in ("leftImg8bit", "gtFine")
        )
        name = f"cityscapes_fine_sem_seg_{split}"
        DatasetCatalog.register(name, partial(load_cityscapes_semantic, image_dir, gt_dir))
        MetadataCatalog.get(name).set(
            image_dir=image_dir,
            gt_dir=gt_dir,
            evaluator_type="cityscapes_sem_seg",
            ignore_label=255,
            **_get_builtin_metadata("cityscapes"),
        )


_root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
register_all_coco(_root)
register_all_cityscapes(_root)
