"""What are the classes of the predefined datasets?"""

from __future__ import annotations

import colorsys
from typing import Any

from detectron2._outside import outside_message, outside_subset

__getattr__ = outside_subset(
    __name__, ("ADE20K_SEM_SEG_CATEGORIES", "CITYSCAPES_CATEGORIES", "KEYPOINT_CONNECTION_RULES")
)
__all__ = ["COCO_CATEGORIES", "COCO_PERSON_KEYPOINT_FLIP_MAP", "COCO_PERSON_KEYPOINT_NAMES"]

# The 80 categories of COCO detection in the order of their ids, by supercategory. The ids run from 1 to
# 90 and leave out the ten that the data set's authors never annotated.
_COCO_THINGS = """
    person
    bicycle, car, motorcycle, airplane, bus, train, truck, boat
    traffic light, fire hydrant, stop sign, parking meter, bench
    bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe
    backpack, umbrella, handbag, tie, suitcase
    frisbee, skis, snowboard, sports ball, kite
    baseball bat, baseball glove, skateboard, surfboard, tennis racket
    bottle, wine glass, cup, fork, knife, spoon, bowl
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake
    chair, couch, potted plant, bed, dining table, toilet
    tv, laptop, mouse, remote, keyboard, cell phone
    microwave, oven, toaster, sink, refrigerator
    book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
_COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def _distinct_color(index: int) -> list[int]:
    """RGB in 0..255; steps by the golden angle put neighbours far apart on the colour circle."""
    hue = index * 0.6180339887 % 1.0
    value = (1.0, 0.75, 0.55)[index % 3]
    return [round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, value)]


def _coco_categories() -> list[dict[str, Any]]:
    names = [name.strip() for line in _COCO_THINGS.strip().splitlines() for name in line.split(",")]
    ids = [i for i in range(1, 91) if i not in _COCO_UNUSED_IDS]
    assert len(names) == len(ids) == 80 and all(names)
    return [
        {"id": i, "name": name, "isthing": 1, "color": _distinct_color(k)}
        for k, (i, name) in enumerate(zip(ids, names))
    ]


# Things only: the 53 "stuff" categories belong to panoptic segmentation, which is outside the subset.
COCO_CATEGORIES = _coco_categories()


# COCO's 17 keypoints of a person, in their order in the files: the nose, then pairs, the left one first.
_PAIRED = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
COCO_PERSON_KEYPOINT_FLIP_MAP = tuple((f"left_{part}", f"right_{part}") for part in _PAIRED)
COCO_PERSON_KEYPOINT_NAMES = ("nose", *(name for pair in COCO_PERSON_KEYPOINT_FLIP_MAP for name in pair))


# The 19 classes that Cityscapes is trained on, by their training ids: what fills the scene, then what is counted in it.
_CITYSCAPES_STUFF = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky"),
)
_CITYSCAPES_THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")


def _get_builtin_metadata(dataset_name: str) -> dict[str, Any]:
    """Metadata of a dataset family: "coco", "coco_person" or "cityscapes"; others are outside the subset."""
    if dataset_name == "cityscapes":
        return {
            "thing_classes": list(_CITYSCAPES_THINGS),
            "stuff_classes": [*_CITYSCAPES_STUFF, *_CITYSCAPES_THINGS],
        }
    if dataset_name == "coco_person":
        return {
            "thing_classes": ["person"],
            "keypoint_names": COCO_PERSON_KEYPOINT_NAMES,
            "keypoint_flip_map": COCO_PERSON_KEYPOINT_FLIP_MAP,
        }
    if dataset_name != "coco":
        raise ImportError(outside_message(f"the metadata of {dataset_name!r}"))
    return {
        "thing_dataset_id_to_contiguous_id": {c["id"]: k for k, c in enumerate(COCO_CATEGORIES)},
        "thing_classes": [c["name"] for c in COCO_CATEGORIES],
        "thing_colors": [c["color"] for c in COCO_CATEGORIES],
    }
