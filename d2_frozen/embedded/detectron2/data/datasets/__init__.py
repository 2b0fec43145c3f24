"""Datasets of known formats; importing this registers the predefined ones."""

from detectron2._outside import outside_subset

from . import builtin as _builtin  # noqa: F401  (registers the predefined datasets)
from .coco import convert_to_coco_json, load_coco_json, load_sem_seg, register_coco_instances

__all__ = ["convert_to_coco_json", "load_coco_json", "load_sem_seg", "register_coco_instances"]

__getattr__ = outside_subset(
    __name__,
    (
        "get_lvis_instances_meta",
        "load_lvis_json",
        "load_voc_instances",
        "register_coco_panoptic",
        "register_coco_panoptic_separated",
        "register_lvis_instances",
        "register_pascal_voc",
    ),
)
