"""Is a COCO dataset fit to train or evaluate on? Every record is looked at before anything else starts.

In: a COCO json and its image folder.
Out: ``CocoReport``: problems with file, image id and annotation id, and the document without the bad records.
Boxes may leave the image by up to one pixel: such rounding is usual, and Detectron2 clips the boxes of a
sample.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

import numpy as np
from PIL import Image, UnidentifiedImageError

from d2_frozen.cpus import usable_cpus
from d2_frozen.data.problems import Problem
from detectron2.utils.file_io import PathManager

BOX_TOLERANCE_PX = 1.0
IMAGE_CHECKS = ("auto", "full", "header", "off")
AUTO_FULL_UP_TO = 5000
CROWDS_DO_NOT_TRAIN = (
    "marked iscrowd 1: regions of many objects, on which nothing is trained. Some labelling tools mark every mask so; "
    "set iscrowd to 0 if each is one object"
)
_OUTSIDE = "bbox is outside the image"
_Record = TypeVar("_Record")
_Found = TypeVar("_Found")
_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)


@dataclass
class CocoReport:
    """What was found in one dataset.

    ``categories``: names in the order of category ids, i.e. of Detectron2's contiguous class ids.
    ``rle_masks``: how many masks of single objects are RLE; 0 where masks are not used.
    ``crowds``, ``annotations``: how many are marked iscrowd 1, and how many there are.
    """

    name: str
    json_file: str
    categories: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    rle_masks: int = 0
    crowds: int = 0
    annotations: int = 0
    _document: dict[str, Any] = field(default_factory=dict, repr=False)
    _bad_images: set[int] = field(default_factory=set, repr=False)  # positions in the document's lists
    _bad_annotations: set[int] = field(default_factory=set, repr=False)
    _segmentations: dict[int, list[list[float]]] = field(default_factory=dict, repr=False)

    def cleaned(self) -> dict[str, Any]:
        """The document without bad images and annotations, and without bad polygons of good annotations."""
        images = [im for i, im in enumerate(self._document["images"]) if i not in self._bad_images]
        kept = {im["id"] for im in images}
        annotations = [
            {**a, "segmentation": self._segmentations[i]} if i in self._segmentations else a
            for i, a in enumerate(self._document.get("annotations", []))
            if i not in self._bad_annotations and a["image_id"] in kept
        ]
        return {**self._document, "images": images, "annotations": annotations}

    def left_out(self) -> tuple[int, int]:
        """(images, annotations) that ``cleaned`` leaves out."""
        clean = self.cleaned()
        return (
            len(self._document["images"]) - len(clean["images"]),
            len(self._document.get("annotations", [])) - len(clean["annotations"]),
        )


def check_coco(
    name: str,
    json_file: str,
    image_root: str,
    *,
    masks: bool,
    training: bool,
    check_images: str = "auto",
    classes: list[str] | None = None,
) -> CocoReport:
    """Look at every record of a COCO dataset.

    Args:
        name: of the dataset, for messages.
        masks: are segmentations used?
        training: then there must be annotations.
        check_images: see DATASETS.CHECK_IMAGES.
        classes: what the categories must be called, in the order of their ids.
    Raises:
        ValueError: ``check_images`` is none of ``IMAGE_CHECKS``.
    """
    if check_images not in IMAGE_CHECKS:
        raise ValueError(
            f"DATASETS.CHECK_IMAGES is {check_images!r}; choose one of {', '.join(IMAGE_CHECKS)}."
        )
    report = CocoReport(name, json_file)
    report._document = _read_document(report, training) or {}
    if not report._document:
        return report
    category_ids = _check_categories(report, classes)
    by_id = _check_image_records(report)
    if check_images != "off":
        _check_image_files(report, image_root, check_images)
    _check_annotations(report, by_id, category_ids, masks)
    _check_unit_of_boxes(report, by_id)
    _check_something_is_left(report, training)
    return report


def _where(report: CocoReport, image: Any = None, annotation: Any = None) -> str:
    parts = [f"{report.name}: {report.json_file}"]
    if isinstance(annotation, Mapping):
        parts.append(f"annotation {annotation.get('id', 'without id')}")
        if image is None and "image_id" in annotation:
            parts.append(f"image {annotation['image_id']}")
    if isinstance(image, Mapping):
        parts.append(f"image {image.get('id', 'without id')} {image.get('file_name', '')}".rstrip())
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------- the document


def _read_document(report: CocoReport, training: bool) -> dict[str, Any] | None:
    def fatal(kind: str, seen: str) -> None:
        report.problems.append(Problem(kind, _where(report), seen, skippable=False))

    try:
        with PathManager.open(report.json_file, "rb") as file:
            raw = file.read()
    except OSError as err:
        # Entries of DATASETS.REGISTER have absolute paths, that were looked for.
        built_in = isinstance(err, FileNotFoundError) and not os.path.isabs(report.json_file)
        hint = (
            "; Detectron2's own datasets are looked for under $DETECTRON2_DATASETS, else datasets/" * built_in
        )
        fatal("the annotation file cannot be read", f"{err}{hint}")
        return None
    try:
        document = json.loads(raw)
    except ValueError as err:
        fatal("the annotation file is no JSON", f"{_looks_like_bytes(raw)}; {err}")
        return None
    # json.loads understands the marks and encodings of Windows' programs; what reads the file later takes UTF-8 only.
    if json.detect_encoding(raw) != "utf-8":
        seen = f"it is {json.detect_encoding(raw)}; save it as UTF-8 without a byte order mark (BOM)"
        fatal("the annotation file is not in plain UTF-8", seen)
        return None
    # Test sets are published without annotations; they can be predicted on.
    needed = ("images", "categories", "annotations") if training else ("images", "categories")
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in needed):
        fatal(
            "the annotation file is no COCO instances json",
            f"{_looks_like(document)}; COCO has lists {needed}",
        )
        return None
    return document


def _looks_like_bytes(raw: bytes) -> str:
    starts = {
        b"": "it is empty",
        b"\xff\xd8\xff": "it is a JPEG image",
        b"\x89PNG": "it is a PNG image",
        b"PK\x03\x04": "it is a zip archive",
        b"\x1f\x8b": "it is gzip data",
        b"<": "it looks like XML or HTML",
        b"version https://git-lfs": "it is a Git LFS pointer, not the file itself",
    }
    text = raw.lstrip()
    for start, kind in starts.items():
        if (start and text.startswith(start)) or (not start and not text):
            return kind
    return f"it starts with {raw[:40]!r}"


def _looks_like(document: Any) -> str:
    if isinstance(document, list):
        first = document[0] if document else None
        if isinstance(first, dict) and {"image_id", "category_id", "score"} <= first.keys():
            return f"it is a list of {len(document)} predictions (COCO results)"
        if isinstance(first, dict) and {"file_name", "annotations"} <= first.keys():
            return "it is a list of Detectron2 dataset dicts"
        keys = f" with keys {sorted(first)[:8]}" if isinstance(first, dict) else ""
        return f"it is a list of {len(document)} {type(first).__name__}s{keys}"
    if not isinstance(document, dict):
        return f"it is a single {type(document).__name__}"
    if {"shapes", "imagePath"} <= document.keys():
        return "it looks like a labelme file of one image"
    with_regions = any(isinstance(value, dict) and "regions" in value for value in document.values())
    if with_regions or "_via_img_metadata" in document:
        return "it looks like a VGG Image Annotator project"
    if document.get("type") == "FeatureCollection":
        return "it is GeoJSON"
    annotations = document.get("annotations")
    if isinstance(annotations, list) and annotations and isinstance(annotations[0], dict):
        if "segments_info" in annotations[0]:
            return "it is a COCO panoptic json"
        if "caption" in annotations[0]:
            return "it is a COCO captions json"
    return f"it is an object with keys {sorted(document)[:8]}"


def _check_categories(report: CocoReport, classes: list[str] | None) -> set[Any]:
    categories, ids = report._document["categories"], set()

    def fatal(kind: str, seen: str) -> None:
        report.problems.append(Problem(kind, _where(report), seen, skippable=False))

    for category in categories:
        if not isinstance(category, dict) or not _is_id(category.get("id")):
            fatal("category without a whole number or text as its id", repr(category)[:80])
        elif not isinstance(category.get("name"), str):
            fatal("category whose name is no text", repr(category)[:80])
        elif category["id"] in ids:
            fatal("duplicate category id", repr(category))
        else:
            ids.add(category["id"])
    if not categories:
        fatal("no categories", "the list is empty")
    if _mixed(ids):
        fatal(
            "category ids are partly numbers, partly text",
            f"{_examples(ids)}; classes are numbered in their order",
        )
        return ids
    good = [c for c in categories if isinstance(c, dict) and _is_id(c.get("id")) and c["id"] in ids]
    report.categories = [c["name"] for c in sorted(good, key=lambda c: c["id"])]
    if classes is not None and classes != report.categories:
        fatal(
            "classes of the DATASETS.REGISTER entry are not the data's categories",
            difference(classes, report.categories, "the entry", "the data"),
        )
    return ids


def difference(first: list[str], second: list[str], first_name: str, second_name: str) -> str:
    """In what two lists of class names differ, in words."""
    only_first = [name for name in first if name not in second]
    only_second = [name for name in second if name not in first]
    if not only_first and not only_second:
        return f"same names, other order: {first_name} has {first}, {second_name} has {second}"
    parts = [f"{first_name} has {len(first)} classes, {second_name} has {len(second)}"]
    parts += [f"only in {first_name}: {', '.join(only_first)}"] if only_first else []
    parts += [f"only in {second_name}: {', '.join(only_second)}"] if only_second else []
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------- images


def _check_image_records(report: CocoReport) -> dict[Any, tuple[int, Any]]:
    """id -> (position, record) of the images with a usable record."""
    by_id: dict[Any, tuple[int, Any]] = {}
    for position, image in enumerate(report._document["images"]):
        kind, seen = "", ""
        if not isinstance(image, dict) or not _is_id(image.get("id")):
            kind, seen = "image without a whole number or text as its id", repr(image)[:80]
        elif not isinstance(image.get("file_name"), str) or not image["file_name"]:
            kind, seen = "image without a file_name", repr(image)[:80]
        elif image["id"] in by_id:
            kind, seen = "duplicate image id", f"also {by_id[image['id']][1]['file_name']}"
        elif not all(isinstance(image.get(k), (int, float)) and image[k] > 0 for k in ("width", "height")):
            kind, seen = "image record without a size", f"{image.get('width')!r} x {image.get('height')!r}"
        if kind:
            report.problems.append(Problem(kind, _where(report, image), seen))
            report._bad_images.add(position)
        else:
            by_id[image["id"]] = position, image
    if _mixed(by_id):
        kind = "image ids are partly numbers, partly text"
        report.problems.append(Problem(kind, _where(report), _examples(by_id), skippable=False))
    return by_id


def _check_image_files(report: CocoReport, image_root: str, level: str) -> None:
    images = report._document["images"]
    to_check = [i for i in range(len(images)) if i not in report._bad_images]
    decode = level == "full" or (level == "auto" and len(to_check) <= AUTO_FULL_UP_TO)

    def look(position: int) -> Problem | None:
        image = images[position]
        found = _image_fault(image_root, image["file_name"], image["width"], image["height"], decode)
        return Problem(found[0], _where(report, image), found[1]) if found else None

    for position, problem in zip(to_check, look_at_files(look, to_check)):
        if problem:
            report.problems.append(problem)
            report._bad_images.add(position)


def look_at_files(look: Callable[[_Record], _Found], records: Sequence[_Record]) -> list[_Found]:
    """``look`` at the files of each record, many at once: opening and decoding them release the interpreter lock."""
    with ThreadPoolExecutor(max_workers=min(32, 4 * usable_cpus())) as pool:
        return list(pool.map(look, records))


def _image_fault(
    image_root: str, file_name: str, width: float, height: float, decode: bool
) -> tuple[str, str] | None:
    """(kind, seen) of what is wrong with an image file, or None."""
    path = os.path.join(image_root, file_name)
    try:
        size, sideways = image_size(path, decode)
    except ImageFileError as err:
        instead = (
            _there_instead(image_root, file_name) if isinstance(err.__cause__, FileNotFoundError) else ""
        )
        return err.kind, err.seen + instead
    shown = size[::-1] if sideways else size
    if shown == (width, height):
        return None
    seen = f"{path} is {shown[0]}x{shown[1]}, the json says {width}x{height}"
    if sideways and size == (width, height):
        seen += "; that is its size before its EXIF orientation is applied, which Detectron2 does"
    return "width and height are not the file's", seen


def _there_instead(image_root: str, file_name: str) -> str:
    """Which file a name may mean that is not there, by the usual slips; "" for none."""
    slashes = file_name.replace("\\", "/")
    stem, suffix = os.path.splitext(slashes)
    decoded = unquote(slashes)
    # Of equal names the last slip holds.
    slips = {
        stem + suffix.lower(): "its suffix is written otherwise",
        stem + suffix.upper(): "its suffix is written otherwise",
        os.path.basename(
            slashes
        ): "file_name has a folder that the folder of images ends with, or that is not there",
        slashes: "file_name has \\ where folders are separated by /",
    }
    for name in (os.path.basename(decoded), decoded):
        slips.setdefault(name, "file_name is written as in a web address, such as %20 for a blank")
    for name, slip in slips.items():
        if name != file_name and os.path.isfile(os.path.join(image_root, name)):
            return f"; there is {os.path.join(image_root, name)}: {slip}"
    return ""


class ImageFileError(ValueError):
    """An image file cannot be used; ``kind`` is equal for equal faults, ``seen`` names the file."""

    def __init__(self, kind: str, seen: str) -> None:
        self.kind, self.seen = kind, seen
        super().__init__(f"{kind} ({seen})")


def image_size(path: str, decode: bool, photo: bool = True) -> tuple[tuple[int, int], bool]:
    """((width, height) as stored, does its EXIF orientation swap them?) of an image file.

    Args:
        decode: read it to its end too.
        photo: will its values be taken for light? Then they must be of 8 bits. False for maps of numbers.
    Raises:
        ImageFileError: missing, broken, too large, no image, or more than 8 bits.
    """
    deep = ""
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            size = image.size
            sideways = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
            if photo:
                deep = more_than_8_bits(image)
            if decode:
                # A JPEG is read to its end, but only an eighth of each side is computed.
                image.draft(None, (max(1, size[0] // 8), max(1, size[1] // 8)))
                image.load()
    except FileNotFoundError as err:
        raise ImageFileError("missing image file", path) from err
    except UnidentifiedImageError as err:
        raise ImageFileError("file is no image", path) from err
    except Image.DecompressionBombError as err:
        raise ImageFileError("image too large to open", f"{path}: {err}") from err
    except (OSError, SyntaxError, ValueError, EOFError) as err:
        raise ImageFileError("broken image file", f"{path}: {err}") from err
    if deep:
        seen = f"{path} has {deep}. Convert it to 8 bits, with the range that matters to you"
        raise ImageFileError("image with more than 8 bits", seen)
    return size, sideways


def more_than_8_bits(image: Image.Image) -> str:
    """What an open image has instead of 8 bits per channel, in words; "" for nothing else.

    Detectron2 and PIL cut off all above 255, and fractions, so that such a photo becomes nearly all white, or black.
    """
    if image.mode == "F":
        return "floating point numbers"
    highest: Any = image.getextrema()[1] if image.mode.startswith("I") else 0
    return f"values up to {highest}, more than 8 bits" if highest > 255 else ""


# ---------------------------------------------------------------------------------------------- annotations


def _check_annotations(report: CocoReport, by_id: dict, category_ids: set[Any], masks: bool) -> None:
    seen_ids: set[Any] = set()
    image_ids = {
        im.get("id") for im in report._document["images"] if isinstance(im, dict) and _is_id(im.get("id"))
    }
    for position, annotation in enumerate(report._document.get("annotations", [])):
        fault = _annotation_fault(annotation, seen_ids, image_ids, by_id, category_ids)
        image = None
        if fault is None:
            report.annotations += 1
            report.crowds += bool(annotation.get("iscrowd"))
            found = by_id.get(annotation["image_id"])
            # The image's own problem is told already; its annotations go with it.
            if found is not None:
                image = found[1]
                fault = _box_fault(annotation.get("bbox"), image["width"], image["height"])
                if fault is None and masks:
                    fault = _segmentation_fault(report, position, annotation, image)
        if fault is not None:
            report.problems.append(Problem(fault[0], _where(report, image, annotation), fault[1]))
            if position not in report._segmentations:
                report._bad_annotations.add(position)


def _annotation_fault(
    annotation: Any, seen_ids: set[Any], image_ids: set[Any], by_id: dict, category_ids: set[Any]
) -> tuple[str, str] | None:
    if not isinstance(annotation, dict) or not _is_id(annotation.get("id")):
        return "annotation without a whole number or text as its id", repr(annotation)[:80]
    if annotation["id"] in seen_ids:
        return "duplicate annotation id", ""
    seen_ids.add(annotation["id"])
    if not _is_id(annotation.get("image_id")) or annotation["image_id"] not in image_ids:
        seen = f"image_id {annotation.get('image_id')!r}{_other_type(annotation.get('image_id'), image_ids)}"
        return "annotation of an image that is not listed", seen
    category = annotation.get("category_id")
    if not _is_id(category) or category not in category_ids:
        return (
            "category id that is not listed",
            f"category_id {category!r}{_other_type(category, category_ids)}",
        )
    if annotation.get("iscrowd", 0) not in (0, 1):  # True and False are 1 and 0
        return "iscrowd is neither 0 nor 1", f"iscrowd {annotation['iscrowd']!r}"
    if annotation.get("ignore", 0) != 0:
        seen = f"ignore {annotation['ignore']!r}, which COCO's evaluation does not have; iscrowd: 1 is its word for it"
        return "annotation that is to be ignored", seen
    return None


def _other_type(wanted: Any, ids: set[Any]) -> str:
    """A hint where the id is listed, but as a number instead of text or the other way round; else ""."""
    try:
        other = int(wanted) if isinstance(wanted, (str, float)) else str(wanted)
    except (ValueError, OverflowError):
        return ""
    return f"; listed is {other!r}, so write {other!r} here, or the other there" if other in ids else ""


def _check_unit_of_boxes(report: CocoReport, by_id: dict) -> None:
    """Boxes that are measured otherwise than in pixels from a corner, with width and height."""
    boxes = partial(_boxes_and_sizes, report, by_id)
    first = next(boxes(), None)
    if first is None:
        return
    shown = f"the first is {first[0]}"
    if all(max(box) <= 1 and min(size) > 2 for box, size in boxes()):
        seen = f"no number of {sum(1 for _ in boxes())} boxes is above 1, {shown}; COCO's are in pixels"
        report.problems.append(
            Problem("boxes are shares of the image", _where(report), seen, skippable=False)
        )
        return
    # A few boxes outside are slips; that all others could be corners too is then chance.
    outside = sum(problem.kind == _OUTSIDE for problem in report.problems)
    if outside <= 2:
        return
    count = sum(1 for _ in boxes())
    if outside > count // 4 and all(
        x0 < x1 <= width and y0 < y1 <= height for (x0, y0, x1, y1), (width, height) in boxes()
    ):
        seen = f"{count} boxes, {shown}; COCO's are x, y, width, height"
        report.problems.append(Problem("all boxes fit if they are x0, y0, x1, y1", _where(report), seen))


def _boxes_and_sizes(report: CocoReport, by_id: dict) -> Iterator[tuple[list[float], tuple[int, int]]]:
    """Boxes of four numbers, with (width, height) of their images."""
    for annotation in report._document.get("annotations", []):
        if not isinstance(annotation, dict) or not _is_box(annotation.get("bbox")):
            continue
        image = by_id.get(annotation["image_id"]) if _is_id(annotation.get("image_id")) else None
        if image:
            yield annotation["bbox"], (image[1]["width"], image[1]["height"])


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)


def _box_fault(box: Any, width: float, height: float) -> tuple[str, str] | None:
    if not _is_box(box):
        return "bbox is not four numbers", repr(box)[:80]
    x, y, w, h = box
    if not math.isfinite(x + y + w + h):
        return "bbox has NaN or infinity", repr(box)
    if w < 0 or h < 0:
        return "bbox has a negative size", f"{box}; COCO boxes are x, y, width, height"
    if w == 0 or h == 0:
        return "bbox has no area", repr(box)
    slack = BOX_TOLERANCE_PX
    outside = x < -slack or y < -slack or x + w > width + slack or y + h > height + slack
    # With the tolerance alone a box could pass that is empty once it is clipped.
    if outside or min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        return _OUTSIDE, f"{box} in {width}x{height} pixels"
    return None


def _segmentation_fault(
    report: CocoReport, position: int, annotation: dict, image: dict
) -> tuple[str, str] | None:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        seen = f"{segmentation!r}; for boxes alone set MODEL.MASK_ON False"
        return "no segmentation, but MODEL.MASK_ON is True", seen
    if isinstance(segmentation, dict):
        report.rle_masks += not annotation.get("iscrowd")
        return _rle_fault(segmentation, int(image["width"]), int(image["height"]))
    if not isinstance(segmentation, list):
        return "segmentation is neither polygons nor RLE", repr(segmentation)[:80]
    if all(type(value) in (int, float) for value in segmentation):
        return (
            "segmentation is one polygon instead of a list of them",
            f"{segmentation!r:.60}; write [[x0, y0, ...]]",
        )
    good = []
    for polygon in segmentation:
        fault = _polygon_fault(polygon)
        if fault is None:
            good.append(polygon)
        else:
            first = fault
    if good and (fault := _place_fault(good, annotation["bbox"])):
        return fault
    if len(good) == len(segmentation):
        return None
    if good:
        report._segmentations[position] = good
    return first


def _place_fault(polygons: list[list[float]], box: list[float]) -> tuple[str, str] | None:
    """Polygons that are not where their box is: training would follow them, and evaluation the box."""
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    if x0 == x1 or y0 == y1:
        return "segmentation without area", f"{polygons!r:.60}"
    x, y, w, h = box
    slack = BOX_TOLERANCE_PX
    if max(box) <= 1:
        return None  # a share of the image, perhaps: of all boxes together that is told
    if x1 < x - slack or x0 > x + w + slack or y1 < y - slack or y0 > y + h + slack:
        seen = f"its points have x {x0:.6g} to {x1:.6g}, y {y0:.6g} to {y1:.6g}; bbox {box}"
        return "segmentation and bbox lie apart", seen
    return None


def _polygon_fault(polygon: Any) -> tuple[str, str] | None:
    if not isinstance(polygon, list):
        return "malformed polygon", f"{polygon!r:.60}; a polygon is a list [x0, y0, x1, y1, ...]"
    if len(polygon) % 2:
        return "polygon with an odd number of coordinates", f"{len(polygon)} numbers"
    if len(polygon) < 6:
        return "polygon with fewer than three points", repr(polygon)
    try:
        finite = math.isfinite(sum(polygon))
    except TypeError:
        return "malformed polygon", f"{polygon!r:.60}"
    return None if finite else ("polygon with NaN or infinity", f"{polygon!r:.60}")


def _rle_fault(rle: dict, width: int, height: int) -> tuple[str, str] | None:
    counts, size = rle.get("counts"), rle.get("size")
    if not isinstance(counts, (list, str)) or not counts or not isinstance(size, list):
        return "malformed RLE", f"{rle!r:.60}; RLE has size [height, width] and counts"
    if size != [height, width]:
        return "RLE of another size than the image", f"{size}, image [height, width] is {[height, width]}"
    runs = _runs_of_text(counts) if isinstance(counts, str) else counts
    if runs is None:
        return "malformed RLE", f"{rle!r:.60}; the text of counts is none that COCO's compression gives"
    if not all(isinstance(c, int) and c >= 0 for c in runs) or sum(runs) != width * height:
        return "RLE whose counts do not fill the image", f"sum is not {width * height}"
    return None if any(runs[1::2]) else ("RLE of an empty mask", "")


def _runs_of_text(text: str) -> list[int] | None:
    """Lengths of the runs of a compressed RLE; None where the text is none.

    A number is groups of 5 bits, the lowest first, in characters from "0" on: 32 more where another follows, and 16 in
    the last one is the sign. From the fourth number on it is the difference to the one two before.
    """
    codes = np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64) - ord("0")
    last = (codes & 32) == 0
    if ((codes < 0) | (codes > 63)).any() or not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    if (ends - starts).max() > 6:  # more than 35 bits
        return None
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((codes & 31) << 5 * place, starts)
    numbers -= np.where(codes[ends] & 16, 1 << 5 * (place[ends] + 1), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return [int(number) for number in numbers]


def _check_something_is_left(report: CocoReport, training: bool) -> None:
    clean = report.cleaned()
    left = clean["images"]
    if training:
        used = {a["image_id"] for a in clean["annotations"] if not a.get("iscrowd")}
        left = [image for image in left if image["id"] in used]
    if not left:
        kind = "nothing to train on" if training else "no images"
        document = report._document
        seen = f"{len(document['images'])} images, {len(document.get('annotations', []))} annotations"
        if training and report.crowds:
            seen += f", of which {report.crowds} are {CROWDS_DO_NOT_TRAIN}"
        if report.problems:
            seen += "; nothing is left when the bad records are left out"
        report.problems.append(Problem(kind, _where(report), seen, skippable=False))


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _mixed(ids: Iterable[Any]) -> bool:
    """Numbers and text have no order among each other."""
    return len({isinstance(value, str) for value in ids}) > 1


def _examples(ids: Iterable[Any]) -> str:
    ids = list(ids)
    number, text = (next(i for i in ids if isinstance(i, str) == is_text) for is_text in (False, True))
    return f"{number!r} and {text!r}"


def across(reports: Iterable[CocoReport]) -> Iterator[Problem]:
    """Problems between datasets of one run: their categories must be the same, in the same order."""
    with_names = [report for report in reports if report.categories]
    for other in with_names[1:]:
        first = with_names[0]
        if other.categories != first.categories:
            seen = difference(first.categories, other.categories, first.name, other.name)
            yield Problem(
                "datasets with different categories", f"{first.name}, {other.name}", seen, skippable=False
            )
