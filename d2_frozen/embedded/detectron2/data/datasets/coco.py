"""How do COCO-format annotations, and folders of label maps, become dataset dicts, and dicts COCO again?

Format: https://cocodataset.org/#format-data. Boxes in these files are [x0, y0, width, height] in pixels.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from detectron2._outside import outside_subset
from detectron2.checkpoint.atomic import write_atomically
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..catalog import DatasetCatalog, MetadataCatalog

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "load_coco_json",
    "load_sem_seg",
    "register_coco_instances",
]

__getattr__ = outside_subset(__name__, ("register_coco_panoptic_separated",))

logger = logging.getLogger(__name__)

Record = dict[str, Any]


# ------------------------------------------------------------------------------------------------ registering


@dataclass(frozen=True)
class _CocoInstances:
    """The function that the catalog keeps for one COCO file; equal ones stand for the same dataset."""

    name: str
    json_file: str
    image_root: str

    def __call__(self) -> list[Record]:
        return load_coco_json(self.json_file, self.image_root, self.name)


def register_coco_instances(
    name: str, metadata: dict[str, Any], json_file: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """Register a dataset in COCO's format for detection and instance segmentation.

    Registering the same files again under the same name only adds the metadata.

    Args:
        name: of the dataset, e.g. "my_train".
        metadata: further facts for its Metadata, e.g. {"thing_colors": [...]}; may be empty.
        json_file: annotations; read when the dataset is first asked for.
        image_root: folder that the "file_name" of an image is relative to.
    Raises:
        AssertionError: the name stands for another dataset already.
    """
    _check_types(name, json_file, image_root)
    loader = _CocoInstances(name, os.fspath(json_file), os.fspath(image_root))
    registered = DatasetCatalog.data.get(name)
    if isinstance(registered, _CocoInstances) and registered != loader:
        raise AssertionError(
            f"dataset {name!r} is registered already, with other files: {registered.json_file} "
            f"(images in {registered.image_root}), now {loader.json_file} (images in {loader.image_root}). "
            "Choose another name."
        )
    if registered is None or not isinstance(registered, _CocoInstances):
        DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(
        json_file=loader.json_file, image_root=loader.image_root, evaluator_type="coco", **metadata
    )


def _check_types(name: Any, json_file: Any, image_root: Any) -> None:
    if not isinstance(name, str):
        raise AssertionError(f"a dataset name is a string, not {name!r}.")
    for what, path in (("json_file", json_file), ("image_root", image_root)):
        if not isinstance(path, str | os.PathLike):
            raise AssertionError(f"dataset {name!r}: {what} is a path, not {path!r}.")


# ---------------------------------------------------------------------------------- COCO -> dicts


def load_coco_json(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
) -> list[Record]:
    """Read a COCO annotation file.

    Annotations of images that the file does not list, and masks without a polygon of three corners, are
    left out with a warning.

    Args:
        json_file: the annotations.
        image_root: put in front of each image's "file_name".
        dataset_name: registered name. With it the class names and the category ids go to its metadata, and
            "category_id" is renumbered to 0..C-1 in the order of the ids; without it ids stay as they are.
        extra_annotation_keys: to copy from the annotations, beside iscrowd, bbox, keypoints and category_id.
    Returns:
        One dict per image, by image id: file_name, height, width, image_id, annotations.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no COCO json, or an image, a box or a segmentation has the wrong form.
        KeyError: an entry lacks a key, or a category id is not in "categories".
        AssertionError: an annotation id occurs twice, or an annotation has "ignore": 1.
        Each names the file and the id.
    """
    path = os.fspath(json_file)
    content = _read_coco(path)
    id_map = _publish_classes(path, content, dataset_name) if dataset_name is not None else None
    images = _images_by_id(path, content["images"])
    grouped = _group_by_image(path, content.get("annotations", []), images)
    logger.info("%s: %d images with %d annotations.", path, len(images), sum(map(len, grouped.values())))

    keys = ("iscrowd", "bbox", "keypoints", "category_id", *(extra_annotation_keys or ()))
    records, maskless = [], 0
    for image_id in sorted(images):
        image = images[image_id]
        annotations = []
        for source in grouped.get(image_id, ()):
            annotation = _convert_annotation(path, source, keys, id_map)
            if annotation is None:
                maskless += 1
            else:
                annotations.append(annotation)
        records.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image_id,
                "annotations": annotations,
            }
        )
    if maskless:
        logger.warning(
            "%s: %d annotations left out, their segmentation has no polygon with an even number "
            "of at least six coordinates.",
            path,
            maskless,
        )
    return records


def _read_coco(path: str) -> dict[str, Any]:
    with PathManager.open(path, "rb") as stream:
        try:
            content = json.load(stream)
        except ValueError as err:  # broken JSON, or bytes that are no text
            raise ValueError(f"{path} is no JSON file: {err}") from err
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        found = (
            f"an object with {sorted(content)[:8]}" if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(
            f'{path} is no COCO annotation file: expected an object with lists "images", "annotations" and '
            f'"categories", found {found}.'
        )
    for part in ("annotations", "categories"):
        if not isinstance(content.get(part, []), list):
            raise ValueError(f'{path} is no COCO annotation file: "{part}" is no list.')
    return content


def _require(path: str, kind: str, entry: Any, keys: Iterable[str]) -> None:
    """Every entry of "images" etc. must be an object with these keys."""
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: an entry of {kind} is no object: {entry!r:.100}")
    missing = [key for key in keys if key not in entry]
    if missing:
        label = f"with id {entry['id']!r}" if "id" in entry else f"{entry!r:.100}"
        raise KeyError(f"{path}: the entry of {kind} {label} lacks {', '.join(missing)}.")


def _publish_classes(path: str, content: dict[str, Any], dataset_name: str) -> dict[Any, int]:
    """Class names and numbering into the metadata of the dataset; returns file id -> 0..C-1."""
    categories = content.get("categories")
    if categories is None:
        raise ValueError(
            f'{path} has no "categories", so the classes of dataset {dataset_name!r} are unknown.'
        )
    for category in categories:
        _require(path, "categories", category, ("id", "name"))
    categories = sorted(categories, key=lambda category: category["id"])
    ids = [category["id"] for category in categories]
    twice = [i for i, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: category ids occur more than once: {twice[:10]}.")
    if ids != list(range(1, len(ids) + 1)):
        logger.warning(
            "%s: the category ids are not 1..%d; they are renumbered 0..%d.", path, len(ids), len(ids) - 1
        )
    id_map = {category_id: k for k, category_id in enumerate(ids)}
    metadata = MetadataCatalog.get(dataset_name)
    metadata.thing_classes = [category["name"] for category in categories]
    metadata.thing_dataset_id_to_contiguous_id = id_map
    return id_map


def _images_by_id(path: str, images: list[Any]) -> dict[Any, Record]:
    by_id: dict[Any, Record] = {}
    for image in images:
        _require(path, "images", image, ("id", "file_name", "height", "width"))
        if image["id"] in by_id:
            raise ValueError(f"{path}: the image id {image['id']!r} occurs more than once.")
        if not isinstance(image["file_name"], str):
            raise ValueError(f"{path}: image {image['id']!r} has the file_name {image['file_name']!r}.")
        by_id[image["id"]] = image
    return by_id


def _group_by_image(path: str, annotations: list[Any], images: dict[Any, Record]) -> dict[Any, list[Record]]:
    """Annotations per image id, in the order of the file."""
    grouped: dict[Any, list[Record]] = defaultdict(list)
    seen: set[Any] = set()
    homeless = 0
    # COCO's own "minival" files of 2014 repeat ids.
    may_repeat = "minival" in os.path.basename(path)
    for annotation in annotations:
        _require(path, "annotations", annotation, ("id", "image_id", "category_id"))
        if annotation["image_id"] not in images:
            homeless += 1
            continue
        if annotation["id"] in seen and not may_repeat:
            raise AssertionError(
                f"{path}: the annotation id {annotation['id']!r} occurs more than once (here in image "
                f"{annotation['image_id']!r}). COCO's evaluation would count only one of "
                "them; make the ids unique."
            )
        seen.add(annotation["id"])
        grouped[annotation["image_id"]].append(annotation)
    if homeless:
        logger.warning(
            "%s: %d of %d annotations left out, they belong to images that the file does not list.",
            path,
            homeless,
            len(annotations),
        )
    return grouped


def _convert_annotation(
    path: str, source: Record, keys: Sequence[str], id_map: dict[Any, int] | None
) -> Record | None:
    """One dataset-dict annotation; None where the segmentation is unusable."""
    where = f"{path}: annotation {source['id']!r} of image {source['image_id']!r}"
    if source.get("ignore", 0) != 0:
        raise AssertionError(f'{where} has "ignore": {source["ignore"]!r}. Remove it, or use "iscrowd": 1.')
    annotation: Record = {key: source[key] for key in keys if key in source}
    if "bbox" in annotation and not (isinstance(annotation["bbox"], list) and len(annotation["bbox"]) == 4):
        raise ValueError(f"{where} has the bbox {annotation['bbox']!r}, expected [x0, y0, width, height].")

    if source.get("segmentation"):
        segmentation = _usable_segmentation(where, source["segmentation"])
        if segmentation is None:
            return None
        annotation["segmentation"] = segmentation
    if annotation.get("keypoints"):
        # COCO's keypoints are pixel indices; pixel centres lie half a pixel further on. Every third is a
        # flag.
        annotation["keypoints"] = [
            v if k % 3 == 2 else v + 0.5 for k, v in enumerate(annotation["keypoints"])
        ]

    annotation["bbox_mode"] = BoxMode.XYWH_ABS
    if id_map is not None:
        category = source["category_id"]
        if category not in id_map:
            raise KeyError(
                f'{where} has category_id {category!r}, which is not in "categories": {list(id_map)[:20]}.'
            )
        annotation["category_id"] = id_map[category]
    return annotation


def _usable_segmentation(where: str, segmentation: Any) -> Any:
    """RLE in compressed form, or the polygons that have an area; None where no polygon is left."""
    if isinstance(segmentation, dict):
        if not {"size", "counts"} <= segmentation.keys():
            raise ValueError(f"{where} has an RLE with {sorted(segmentation)}, expected size and counts.")
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, *segmentation["size"])
        return segmentation
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError(
            f"{where} has a segmentation that is neither an RLE nor a list of polygons "
            f"[[x0, y0, x1, y1, ...], ...]: {segmentation!r:.80}"
        )
    return [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0] or None


# ------------------------------------------------------------------------------------------------ label maps


def load_sem_seg(
    gt_root: str, image_root: str, gt_ext: str = "png", image_ext: str = "jpg"
) -> list[dict[str, str]]:
    """Pair the images of one folder with the label maps of another by their names without extension.

    Args:
        gt_root: folder of label maps, one class number per pixel.
        image_root: folder of images.
        gt_ext, image_ext: which files to look at.
    Returns:
        Dicts with file_name and sem_seg_file_name, sorted by name. A file without partner is left out and
        counted in a warning.
    Raises:
        AssertionError: there is no pair; names both folders.
    """
    images, labels = _stems(image_root, image_ext), _stems(gt_root, gt_ext)
    pairs = sorted(images.keys() & labels.keys())
    if not pairs:
        raise AssertionError(
            f"no image *.{image_ext} in {image_root} ({len(images)} there) has a label map "
            f"*.{gt_ext} of the same name in {gt_root} ({len(labels)} there)."
        )
    alone = len(images) + len(labels) - 2 * len(pairs)
    if alone:
        logger.warning("%s and %s: %d files left out, they have no partner.", image_root, gt_root, alone)
    logger.info("%s: %d images with label maps.", image_root, len(pairs))
    return [{"file_name": images[stem], "sem_seg_file_name": labels[stem]} for stem in pairs]


def _stems(folder: str, extension: str) -> dict[str, str]:
    """Name without extension -> path, for the files of a folder that end so."""
    names = [name for name in PathManager.ls(folder) if name.endswith(extension)]
    return {os.path.splitext(name)[0]: os.path.join(folder, name) for name in names}


# ---------------------------------------------------------------------------------- dicts -> COCO


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """A registered dataset in COCO's format, e.g. to evaluate it by COCO's protocol.

    Category ids are turned back to those of the original file where the metadata knows them. Coordinates are
    rounded to a thousandth of a pixel.
    """
    records = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    id_map = metadata.get("thing_dataset_id_to_contiguous_id")
    original_id = (
        {v: k for k, v in id_map.items()} if id_map else {k: k for k in range(len(metadata.thing_classes))}
    )

    images, annotations = [], []
    for place, record in enumerate(records):
        image_id = record.get("image_id", place)
        images.append(
            {
                "id": image_id,
                "width": int(record["width"]),
                "height": int(record["height"]),
                "file_name": str(record["file_name"]),
            }
        )
        for annotation in record.get("annotations", ()):
            entry = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append(entry | _coco_annotation(annotation, original_id))
    content: dict[str, Any] = {
        "info": {
            "description": f"{dataset_name}, converted from dataset dicts",
            "date_created": datetime.datetime.now().isoformat(timespec="seconds"),
        },
        "licenses": None,
        "images": images,
        "categories": [{"id": original_id[k], "name": name} for k, name in enumerate(metadata.thing_classes)],
    }
    # Without the key an evaluator knows that there is no ground truth, e.g. for a test split.
    if annotations:
        content["annotations"] = annotations
    return content


def _coco_annotation(annotation: Record, original_id: dict[int, Any]) -> Record:
    bbox = np.asarray(annotation["bbox"], dtype=np.float64)
    # A rotated box stays one; the third and fourth number are width and height of either.
    mode = BoxMode.XYWHA_ABS if bbox.shape == (5,) else BoxMode.XYWH_ABS
    box = BoxMode.convert(bbox.tolist(), annotation["bbox_mode"], mode)
    entry: Record = {
        "bbox": [round(float(v), 3) for v in box],
        "area": float(box[2] * box[3]),
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "category_id": original_id[annotation["category_id"]],
    }
    segmentation = annotation.get("segmentation")
    if segmentation is not None and len(segmentation):
        entry["area"], entry["segmentation"] = _area_and_json(segmentation)
    keypoints = annotation.get("keypoints")
    if keypoints is not None and len(keypoints):
        # Back to pixel indices, see _convert_annotation.
        points = np.array(keypoints, dtype=np.float64).reshape(-1, 3) - [0.5, 0.5, 0]
        entry["keypoints"] = [v for x, y, flag in points.tolist() for v in (x, y, int(flag))]
        entry["num_keypoints"] = int((points[:, 2] > 0).sum())
    return entry


def _area_and_json(segmentation: Any) -> tuple[float, Any]:
    """Area in pixels, and the segmentation as JSON takes it."""
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
        return sum(map(_polygon_area, polygons)), [polygon.reshape(-1).tolist() for polygon in polygons]
    if isinstance(segmentation, dict):
        rle = dict(segmentation)
        if isinstance(rle["counts"], list):
            rle = mask_util.frPyObjects(rle, *rle["size"])
        area = float(mask_util.area(rle))
        if isinstance(rle["counts"], bytes):
            rle["counts"] = rle["counts"].decode("ascii")
        return area, rle
    raise ValueError(
        f"a segmentation of type {type(segmentation).__name__} cannot be written to a COCO file."
    )


def _polygon_area(corners: np.ndarray) -> float:
    """Shoelace formula for (N, 2) corners."""
    x, y = corners.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Write :func:`convert_to_coco_dict` to a file; either the whole file appears, or none.

    Args:
        output_file: where to.
        allow_cached: leave a file that is there already as it is.
    """
    if allow_cached and PathManager.exists(output_file):
        logger.warning(
            "%s exists and is used as it is; remove it if dataset %r has changed since.",
            output_file,
            dataset_name,
        )
        return
    content = convert_to_coco_dict(dataset_name)
    folder = os.path.dirname(os.path.abspath(output_file))
    PathManager.mkdirs(folder)
    write_atomically(output_file, lambda stream: stream.write(json.dumps(content).encode()))
    logger.info(
        "%s: dataset %r in COCO format, %d images.", output_file, dataset_name, len(content["images"])
    )
