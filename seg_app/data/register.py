"""``type: sem_seg`` in DATASETS.REGISTER: a folder of images, a folder of label maps, class names.

DATASETS:
  REGISTER:
    - {name: street_train, type: sem_seg, images: street/photos, labels: street/ids, classes: [road, car, person]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d2_frozen.data import entry_type
from d2_frozen.data.register import read_class_list
from d2_frozen.files import walk
from detectron2.data import DatasetCatalog, MetadataCatalog

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
_LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
_CLASS_FILES = ("classes.txt", "classes.json")


@entry_type(
    "sem_seg",
    required=("images", "labels"),
    optional=("classes", "ignore_label", "label_values", "image_suffix", "label_suffix"),
    path_fields=("images", "labels"),
    file_fields=(),
)
def _register_sem_seg(name: str, fields: dict[str, Any]) -> None:
    beside = {} if fields.get("classes") else _facts_beside(fields["labels"], name)
    classes = fields.get("classes") or beside.get("stuff_classes")
    facts: dict[str, Any] = {"stuff_classes": classes} if classes else {}
    ignore_label = _ignore_label(fields.get("ignore_label", beside.get("ignore_label")), classes, name)
    label_values = _label_values(fields.get("label_values"), classes, name)
    if label_values is not None:
        # Detectron2's name for it: its evaluator writes the data's own numbers then.
        facts["stuff_dataset_id_to_contiguous_id"] = {value: k for k, value in enumerate(label_values)}
    folders = {
        "image_root": fields["images"],
        "sem_seg_root": fields["labels"],
        "image_suffix": fields.get("image_suffix", ""),
        "label_suffix": fields.get("label_suffix", ""),
    }

    def load() -> list[dict[str, Any]]:
        how_to_read = {"ignore_label": ignore_label, "label_values": label_values}
        pairs = find_pairs(*folders.values()).pairs
        return [{"file_name": image, "sem_seg_file_name": labels, **how_to_read} for image, labels in pairs]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        evaluator_type="sem_seg", ignore_label=ignore_label, label_values=label_values, **folders, **facts
    )


class Pairs(NamedTuple):
    """(image, label map) paths in order of name; files without partner; files that share a name with another."""

    pairs: list[tuple[str, str]]
    images_alone: list[str]
    labels_alone: list[str]
    doubles: list[str]


def find_pairs(images: str, labels: str, image_suffix: str = "", label_suffix: str = "") -> Pairs:
    """Images and label maps of the same name, subfolders included.

    Args:
        images, labels: folders.
        image_suffix, label_suffix: ends of the names, which are no part of what must be the same
            ("_leftImg8bit.png"); "" stands for the usual extensions.
    """
    doubles: list[str] = []
    # One folder may lie in the other, or be the same, where a suffix says which files are label maps.
    inside = os.path.join(images, "") if images.startswith(os.path.join(labels, "")) else None
    label_of = _by_stem(
        labels,
        (label_suffix,) if label_suffix else _LABEL_SUFFIXES,
        doubles,
        lambda path: inside is not None and path.startswith(inside),
    )
    taken = set(label_of.values()) if label_suffix or images != labels else set()
    image_of = _by_stem(
        images, (image_suffix,) if image_suffix else _IMAGE_SUFFIXES, doubles, taken.__contains__
    )
    both = sorted(image_of.keys() & label_of.keys())
    return Pairs(
        [(image_of[stem], label_of[stem]) for stem in both],
        [image_of[stem] for stem in sorted(image_of.keys() - label_of.keys())],
        [label_of[stem] for stem in sorted(label_of.keys() - image_of.keys())],
        doubles,
    )


def _by_stem(
    folder: str, suffixes: Sequence[str], doubles: list[str], is_other: Callable[[str], bool]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for parent, _, names in walk(folder):
        for name in names:
            suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
            path = os.path.join(parent, name)
            if suffix is None or name.startswith(".") or is_other(path):
                continue
            stem = os.path.relpath(path, folder)[: -len(suffix)].replace(os.sep, "/")
            if stem in found:
                doubles.append(path)
            else:
                found[stem] = path
    return found


def _facts_beside(labels: str, name: str) -> dict[str, Any]:
    """ "stuff_classes" of a class file in the folder of label maps or in one of the two above it.

    A JSON file may also be an object with Detectron2's names, {"stuff_classes": [...], "ignore_label": 255}.
    """
    folder, place = Path(labels), f"DATASETS.REGISTER ({name})"
    files = (
        parent / file for parent in (folder, folder.parent, folder.parent.parent) for file in _CLASS_FILES
    )
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return {}
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as err:
            raise ValueError(f"{place}: class file {path} is not JSON: {err}") from err
        if isinstance(content, dict) and "stuff_classes" in content:
            return {**content, "stuff_classes": read_class_list(content["stuff_classes"], f"{place}, {path}")}
    return {"stuff_classes": read_class_list(str(path), place)}


def _ignore_label(given: Any, classes: list[str] | None, name: str) -> int:
    if given is None:
        return 255 if classes is None or len(classes) <= 255 else 65535
    if type(given) is not int or given < 0 or (classes and given < len(classes)):
        raise ValueError(
            f"DATASETS.REGISTER ({name}): ignore_label is {given!r}; a number that is no class id is wanted. Where ids "
            "in your files do not begin at 0, list them in label_values, in the order of classes, as [1, 2, 3]; all "
            "other numbers are ignored then."
        )
    return given


def _label_values(given: Any, classes: list[str] | None, name: str) -> list[int] | None:
    if given is None:
        return None
    numbers = isinstance(given, (list, tuple)) and all(type(v) is int and 0 <= v <= 65535 for v in given)
    if not numbers or not classes or len(given) != len(classes) or len(set(given)) != len(given):
        raise ValueError(
            f"DATASETS.REGISTER ({name}): label_values is {given!r}; it is a list of the numbers (0 to 65535) that "
            f"stand in the label maps for the {len(classes or [])} classes, in their order."
        )
    return list(given)
