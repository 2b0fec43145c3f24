"""Which ground truth COCO's protocol measures against: a COCO json, read and put in order.

What the protocol needs and files in the wild leave out is filled in (``iscrowd``, ``area``); what would
distort the result without a word is set right (annotation ids) or reported (images listed twice, annotations
without a mask).
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_coding
from faster_coco_eval.core.coco import COCO

from detectron2.utils.file_io import PathManager

_log = logging.getLogger(__name__)


def read_truth(json_file: str) -> COCO:
    """Read a COCO json into an indexed ``COCO``.

    Raises:
        ValueError: the file is no COCO json; says what is missing.
    """
    with PathManager.open(PathManager.get_local_path(json_file), "rb") as handle:
        try:
            content = json.load(handle)
        except ValueError as err:
            raise ValueError(f"{json_file} is no json file: {err}") from err
    if not isinstance(content, dict):
        raise ValueError(
            f"{json_file} is no COCO json: its top level is a {type(content).__name__}, not an object."
        )
    return index_truth(content, json_file)


def index_truth(content: Mapping[str, Any], source: str) -> COCO:
    """Index COCO ground truth that is in memory.

    Args:
        content: ``images``, ``categories``, and ``annotations`` unless this is a test set without public
            truth.
        source: file or dataset name, for messages.
    """
    missing = [key for key in ("images", "categories") if not isinstance(content.get(key), list)]
    if missing:
        lists = " and no list ".join(missing)
        raise ValueError(f"{source} is no COCO json for detection: it has no list {lists}.")
    truth = dict(content)
    truth["images"] = _images_once(content["images"], source)
    if "annotations" in content:
        truth["annotations"] = _complete(content["annotations"], truth["images"], source)
    return _AnyIds(truth)


def without_missing_masks(truth: COCO, source: str) -> COCO:
    """The truth for mask evaluation: annotations that have no usable mask are left out, counted and logged.

    Raises:
        ValueError: no annotation has one.
    """
    annotations = truth.dataset["annotations"]
    usable = [a for a in annotations if _has_mask(a)]
    if len(usable) == len(annotations):
        return truth
    lost = [a["id_in_file"] for a in annotations if not _has_mask(a)]
    if not usable:
        raise ValueError(
            f"{source}: none of the {len(annotations)} annotations has a segmentation, but the "
            "predictions have masks. Evaluate boxes only: COCOEvaluator(..., tasks=('bbox',))."
        )
    _log.warning(
        "%s: %d of %d annotations have no usable segmentation and are left out of the mask evaluation (%s).",
        source,
        len(lost),
        len(annotations),
        _some(lost),
    )
    return _AnyIds({**truth.dataset, "annotations": usable})


class _AnyIds(COCO):
    """Indexed by the ids as they are; the original makes numbers of those of images, which text has none of."""

    def createIndex(self) -> None:
        self.imgs = {image["id"]: image for image in self.dataset["images"]}
        self.cats = {category["id"]: category for category in self.dataset["categories"]}
        self.anns, self.imgToAnns, self.catToImgs = {}, defaultdict(list), defaultdict(list)
        for annotation in self.dataset.get("annotations", ()):
            self.anns[annotation["id"]] = annotation
            self.imgToAnns[annotation["image_id"]].append(annotation)
            self.catToImgs[annotation["category_id"]].append(annotation["image_id"])


def _images_once(images: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    by_id: dict[Any, dict[str, Any]] = {}
    twice = []
    for position, image in enumerate(images):
        try:
            image_id = _image_id(image.get("id"))
        except (TypeError, ValueError) as err:
            raise ValueError(
                f"{source}: image {position} (file_name {image.get('file_name')!r}) has the id {image.get('id')!r}; "
                "the COCO protocol needs integers, or text."
            ) from err
        if image_id in by_id:
            twice.append(image_id)
        else:
            by_id[image_id] = {**image, "id": image_id}
    if twice:
        _log.warning(
            "%s lists %d image ids more than once (%s); their annotations are taken together.",
            source,
            len(twice),
            _some(twice),
        )
    return list(by_id.values())


def _image_id(value: Any) -> int | str:
    """Text stays text, as data loaders hand it on; 1.0 is 1."""
    return value if isinstance(value, str) else int(value)


def _complete(
    annotations: Iterable[Mapping[str, Any]], images: Iterable[Mapping[str, Any]], source: str
) -> list[dict[str, Any]]:
    known = {image["id"]: image for image in images}
    done = []
    strays = []
    # Fresh ids from 1 on: the matching code of every COCO implementation takes the id 0 for "no match", and a
    # repeated id for the same object.
    for number, original in enumerate(annotations, 1):
        annotation = dict(original)
        for key in ("image_id", "category_id"):
            if key not in annotation:
                raise ValueError(
                    f"{source}: annotation {number - 1} (id {original.get('id')!r}) has no {key}."
                )
        annotation["image_id"] = _image_id(annotation["image_id"])
        if annotation["image_id"] not in known:
            strays.append(original.get("id"))
            continue
        if "bbox" not in annotation:
            raise ValueError(f"{source}: annotation {number - 1} (id {original.get('id')!r}) has no bbox.")
        annotation["id_in_file"], annotation["id"] = original.get("id"), number
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        if annotation.get("area") is None:
            annotation["area"] = _area(annotation, known[annotation["image_id"]])
        done.append(annotation)
    if strays:
        _log.warning(
            "%s: %d annotations belong to no listed image and are left out (%s).",
            source,
            len(strays),
            _some(strays),
        )
    return done


def _area(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> float:
    """In pixels; of the mask where there is one, else of the box."""
    if not _has_mask(annotation) or "height" not in image or "width" not in image:
        _, _, width, height = annotation["bbox"]
        return float(width * height)
    mask = annotation["segmentation"]
    if isinstance(mask, list) or isinstance(mask["counts"], list):
        mask = mask_coding.frPyObjects(mask, image["height"], image["width"])
    if isinstance(mask, list):
        mask = mask_coding.merge(mask)
    return float(np.sum(mask_coding.area(mask)))


def _has_mask(annotation: Mapping[str, Any]) -> bool:
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        return "counts" in mask and "size" in mask
    # A polygon needs three points; four numbers would be read as a box.
    return (
        isinstance(mask, list)
        and len(mask) > 0
        and all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in mask)
    )


def _some(ids: Sequence[Any], most: int = 5) -> str:
    shown = ", ".join(str(i) for i in ids[:most])
    return f"ids {shown}{', ...' if len(ids) > most else ''}"
