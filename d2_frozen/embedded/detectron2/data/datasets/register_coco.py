"""Older import path of the COCO registration functions."""

from detectron2._outside import outside_subset

from .coco import register_coco_instances

__all__ = ["register_coco_instances"]

__getattr__ = outside_subset(__name__, ("register_coco_panoptic", "register_coco_panoptic_separated"))
