"""Are images and label maps fit to train or evaluate on? Every pair is looked at before anything else starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from d2_frozen.data.checks import AUTO_FULL_UP_TO, IMAGE_CHECKS, ImageFileError, image_size, look_at_files
from d2_frozen.data.label_maps import (
    LabelMapError,
    check_id_mode,
    check_map_size,
    check_map_values,
    read_label_map,
)
from d2_frozen.data.label_values import values_of
from d2_frozen.data.problems import Problem
from d2_frozen.files import walk
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from seg_app.data.ade20k import SPLITS as ADE20K
from seg_app.data.register import find_pairs


@dataclass
class LabelMapReport:
    """What was found in one dataset.

    bad_files: images of records that had better be left out.
    present: class ids that occur; None if the label maps were not decoded.
    ignored_label: the ignore label if it occurs, and stands in the files as it is.
    """

    name: str
    classes: list[str]
    problems: list[Problem] = field(default_factory=list)
    bad_files: list[str] = field(default_factory=list)
    present: set[int] | None = None
    ignored_label: int | None = None

    def add(self, kind: str, where: str, seen: str = "", skippable: bool = True) -> None:
        self.problems.append(Problem(kind, f"{self.name}: {where}", seen, skippable))


def check_label_maps(name: str, *, check_images: str = "auto", training: bool = True) -> LabelMapReport:
    """Look at every image and label map of a registered dataset.

    Args:
        check_images: see DATASETS.CHECK_IMAGES; "full" decodes label maps too, and looks at their values.
        training: label maps must then hold something beside the ignore label.
    Raises:
        ValueError: no such check; the dataset has no label maps.
        FileNotFoundError: a folder is missing.
    """
    if check_images not in IMAGE_CHECKS:
        raise ValueError(
            f"DATASETS.CHECK_IMAGES is {check_images!r}; choose one of {', '.join(IMAGE_CHECKS)}."
        )
    if name not in DatasetCatalog.list():
        DatasetCatalog.get(name)  # its error says which names there are
    facts = MetadataCatalog.get(name)
    report = LabelMapReport(name, list(facts.get("stuff_classes", None) or []))
    if not _check_folders(report, facts):
        return report
    records = DatasetCatalog.get(name)
    if records and "sem_seg_file_name" not in records[0]:
        raise ValueError(
            f"{name} has no label maps (sem_seg_file_name); segmentation needs a dataset of the type sem_seg, see "
            "DATASETS.REGISTER."
        )
    if check_images != "off":
        decode = check_images == "full" or (check_images == "auto" and len(records) <= AUTO_FULL_UP_TO)
        _check_files(report, records, facts, decode, training)
    if records and len(report.bad_files) == len(records):
        report.add("no usable image is left", f"{len(records)} images", skippable=False)
    return report


def _check_folders(report: LabelMapReport, facts: Any) -> bool:
    """Are there pairs? Files without partner are problems."""
    images, labels = facts.get("image_root", None), facts.get("sem_seg_root", None)
    if images is None or labels is None:
        return True  # the dataset's own function knows its files
    for folder in (images, labels):
        if not os.path.isdir(folder):
            hint = " `python -m seg_app.prepare ade20k` makes it from the official release." * (
                report.name in ADE20K
            )
            raise FileNotFoundError(f"{report.name}: there is no folder {folder}.{hint}")
    suffixes = facts.get("image_suffix", ""), facts.get("label_suffix", "")
    found = find_pairs(images, labels, *suffixes)
    for path in found.images_alone:
        report.add("image without label map", path, f"none of its name in {labels}")
    for path in found.labels_alone:
        report.add("label map without image", path, f"none of its name in {images}")
    for path in found.doubles:
        seen = "they differ in the extension only; image_suffix: .jpg, say, and label_suffix: .png choose one of them"
        report.add("two files of one name", path, seen, skippable=False)
    if not found.pairs:
        counts = f"{len(found.images_alone)} images, {len(found.labels_alone)} label maps"
        if not found.labels_alone and any(
            name.lower().endswith((".jpg", ".jpeg")) for _, _, names in walk(labels) for name in names
        ):
            counts += "; JPEG is no format for label maps, since it changes numbers: save them as PNG"
        elif found.images_alone and found.labels_alone:
            counts += "; where names differ in their ends, give image_suffix and label_suffix, e.g. .jpg and _mask.png"
        report.add("no image with a label map of its name", f"{images} and {labels}", counts, skippable=False)
    return bool(found.pairs)


def _check_files(
    report: LabelMapReport, records: Sequence[dict[str, Any]], facts: Any, decode: bool, training: bool
) -> None:
    ignore_label, values = facts.get("ignore_label", 255), facts.get("label_values", None)

    def look(record: dict[str, Any]) -> tuple[tuple[str, str] | None, list[int] | None]:
        try:
            return None, _look(record, decode, ignore_label, values, len(report.classes))
        except (ImageFileError, LabelMapError) as err:
            return (err.kind, err.seen), None

    results = look_at_files(look, records)
    for record, (fault, _) in zip(records, results):
        if fault:
            report.add(fault[0], record["file_name"], fault[1])
            report.bad_files.append(record["file_name"])
    if decode:
        seen = [present for _, present in results if present is not None]
        report.present = set().union(*seen) - {ignore_label}
        if training and not report.present and seen:
            report.add(
                "no pixel has a class",
                f"{len(records)} images",
                f"all label maps hold the ignore label {ignore_label} only",
                skippable=False,
            )
        ignored = any(ignore_label in present for present in seen)
        report.ignored_label = ignore_label if ignored and values is None else None
        if training and len(report.classes) <= 2 and report.present == {0} and report.ignored_label == 255:
            wanted = "label_values: [0, 255] in the entry makes it the second class"
            if len(report.classes) == 1:
                wanted = (
                    f"classes: [background, {report.classes[0]}] and label_values: [0, 255] make it a class"
                )
            report.add(
                "masks in black and white, of which white (255) is ignored",
                f"{len(records)} images",
                wanted,
                skippable=False,
            )


def _look(
    record: dict[str, Any],
    decode: bool,
    ignore_label: int,
    values: Sequence[int] | None,
    classes: int,
) -> list[int] | None:
    """The numbers that occur in a label map, if it is decoded; raises what is wrong with it or the image."""
    path = record["sem_seg_file_name"]
    (width, height), sideways = image_size(record["file_name"], decode)
    shown = (height, width) if sideways else (width, height)
    size, _ = image_size(path, decode=False, photo=False)
    check_map_size(path, size, shown, " as its EXIF orientation turns it" * sideways)
    if not decode:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            check_id_mode(path, image.mode)
        return None
    present = values_of(read_label_map(path, values, ignore_label))
    if classes:
        check_map_values(
            path,
            present,
            classes,
            ignore_label,
            f"the {classes} classes are 0 to {classes - 1}, and {ignore_label} is ignored. Where other numbers stand "
            "for classes, list them in label_values",
        )
    return present
