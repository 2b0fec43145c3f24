"""Own data without code: DATASETS.REGISTER entries -> DatasetCatalog and MetadataCatalog.

    DATASETS:
      REGISTER:
        - {name: nuts_train, type: coco_instances, json: nuts/train.json, images: nuts/photos}

Nothing is read here: a dataset is loaded when somebody asks the catalog for it. Other tasks add their own
types of entries with ``entry_type``.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

_COMMON_FIELDS = ("name", "type")


@dataclass(frozen=True)
class EntryType:
    """A kind of entry: its fields, and the function that registers one.

    ``register(name, fields)`` gets every field of the entry but name and type. Those in ``path_fields`` are
    resolved already, but files of datasets that are not used may be missing. Of them, those in ``file_fields`` must be
    files and the others folders; None where that does not matter.
    """

    register: Callable[[str, dict[str, Any]], None]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    path_fields: tuple[str, ...]
    file_fields: tuple[str, ...] | None = None


ENTRY_TYPES: dict[str, EntryType] = {}
# What this process registered, to tell "the same again" from "another one under the same name".
_registered: dict[str, dict[str, Any]] = {}


def entry_type(
    name: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    path_fields: Sequence[str] = (),
    file_fields: Sequence[str] | None = None,
) -> Callable[[Callable[[str, dict[str, Any]], None]], Callable[[str, dict[str, Any]], None]]:
    """Decorator: make ``type: NAME`` known in DATASETS.REGISTER, see :class:`EntryType`."""

    def add(register: Callable[[str, dict[str, Any]], None]) -> Callable[[str, dict[str, Any]], None]:
        assert name not in ENTRY_TYPES, f"entry type {name} is defined twice"
        files = None if file_fields is None else tuple(file_fields)
        ENTRY_TYPES[name] = EntryType(register, tuple(required), tuple(optional), tuple(path_fields), files)
        return register

    return add


def register_from_config(cfg: CfgNode, used: Iterable[str] | None = None) -> None:
    """Register every entry of DATASETS.REGISTER. Registering an equal entry again does nothing.

    Args:
        cfg: with ``add_frozen_config``'s keys.
        used: names whose files must exist now; DATASETS.TRAIN and DATASETS.TEST if None. An unused entry may
            name files that are not there.
    Raises:
        ValueError: malformed entry, unknown type or field (names the nearest known one), a file where a folder is
            wanted, or a name that stands for two different datasets.
        FileNotFoundError: a file or folder of a used entry is missing.
    """
    used = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} if used is None else set(used)
    for position, entry in enumerate(cfg.DATASETS.REGISTER or ()):
        place = f"DATASETS.REGISTER[{position}]"
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"{place} is {entry!r}; an entry is a mapping such as {{name: ..., type: ..., ...}}."
            )
        _register_entry(dict(entry), place, must_exist=entry.get("name") in used)


def entry_of(name: str) -> dict[str, Any] | None:
    """The entry, with resolved paths, under which ``name`` was registered; None for other datasets."""
    return _registered.get(name)


def find_path(path: str) -> str:
    """Relative to DETECTRON2_DATASETS if it exists there, else to the working directory; URLs stay."""
    if "://" in path:
        return path  # Detectron2's PathManager knows what to do with it
    path = os.path.expanduser(path)
    root = os.environ.get("DETECTRON2_DATASETS")
    if root and not os.path.isabs(path):
        in_root = os.path.join(os.path.expanduser(root), path)
        if os.path.exists(in_root):
            return os.path.abspath(in_root)
    return os.path.abspath(path)


def load_coco_instances(
    json_file: str, image_root: str, name: str, sem_seg_root: str | None = None
) -> list[dict[str, Any]]:
    """Detectron2's ``load_coco_json``, with polygon coordinates as floats, and label maps where there are some.

    A polygon of integers becomes an integer array in Detectron2, whose resizing then cuts off the fractions:
    half a pixel of shift in the mean.

    Args:
        sem_seg_root: folder of semantic label maps: for each image a PNG of its name. Records then get
            "sem_seg_file_name".
    """
    records = load_coco_json(json_file, image_root, name)
    for record in records:
        if sem_seg_root is not None:
            stem = os.path.splitext(os.path.relpath(record["file_name"], image_root))[0]
            record["sem_seg_file_name"] = os.path.join(sem_seg_root, f"{stem}.png")
        for annotation in record["annotations"]:
            polygons = annotation.get("segmentation")
            if isinstance(polygons, list):
                annotation["segmentation"] = [
                    [float(v) for v in polygon] if all(type(v) is int for v in polygon) else polygon
                    for polygon in polygons
                ]
    return records


def read_class_list(classes: Any, place: str) -> list[str] | None:
    """Class names of an entry: a list, or a file (.json with a list, else one name per line).

    Raises:
        ValueError: neither, empty, another encoding than UTF-8, or a name that stands twice.
        FileNotFoundError: no such file.
    """
    if classes is None:
        return None
    if isinstance(classes, str):
        path = Path(find_path(classes))
        if not path.is_file():
            raise FileNotFoundError(f"{place}: no class file at {path}.")
        try:
            text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark
        except UnicodeDecodeError as err:
            raise ValueError(f"{place}: class file {path} is not in UTF-8; save it as UTF-8. {err}") from err
        try:
            classes = json.loads(text) if path.suffix == ".json" else text.split("\n")
        except ValueError as err:
            raise ValueError(f"{place}: class file {path} is not JSON: {err}") from err
        if path.suffix != ".json":
            classes = [line.strip() for line in classes if line.strip()]
    if not isinstance(classes, (list, tuple)) or not classes or not all(isinstance(c, str) for c in classes):
        raise ValueError(
            f"{place}: classes is {classes!r}; give a list of names, or a file with one per line."
        )
    twice = sorted({c for c in classes if list(classes).count(c) > 1})
    if twice:
        raise ValueError(f"{place}: classes names {', '.join(twice)} more than once.")
    return list(classes)


@entry_type(
    "coco_instances",
    required=("json", "images"),
    optional=("classes", "sem_seg"),
    path_fields=("json", "images", "sem_seg"),
    file_fields=("json",),
)
def _register_coco_instances(name: str, fields: dict[str, Any]) -> None:
    json_file, image_root, sem_seg_root = fields["json"], fields["images"], fields.get("sem_seg")
    DatasetCatalog.register(name, lambda: load_coco_instances(json_file, image_root, name, sem_seg_root))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")
    if sem_seg_root is not None:
        MetadataCatalog.get(name).set(sem_seg_root=sem_seg_root)


def _register_entry(entry: dict[str, Any], place: str, must_exist: bool) -> None:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place} has no name: {entry!r}.")
    place = f"{place} ({name})"
    kind = ENTRY_TYPES.get(str(entry.get("type")))
    if kind is None:
        wrong, types = entry.get("type"), sorted(ENTRY_TYPES)
        said = (
            "has no type" if wrong is None else f"has the unknown type {wrong!r}{_nearest(str(wrong), types)}"
        )
        raise ValueError(f"{place} {said}; types are {', '.join(types)}.")
    known = (*_COMMON_FIELDS, *kind.required, *kind.optional)
    for field in entry:
        if field not in known:
            raise ValueError(
                f"{place} has the unknown field {field!r}{_nearest(str(field), known)}; "
                f"fields of {entry['type']} are {', '.join(known)}."
            )
    missing = [field for field in kind.required if not entry.get(field)]
    if missing:
        raise ValueError(
            f"{place} lacks {', '.join(missing)}; {entry['type']} needs {', '.join(kind.required)}."
        )

    resolved = dict(entry)
    for field in kind.path_fields:
        if entry.get(field) is None:
            continue
        if not isinstance(entry[field], str):
            raise ValueError(f"{place}: {field} is {entry[field]!r}; it must be a path.")
        resolved[field] = find_path(entry[field])
        if must_exist and "://" not in resolved[field] and not os.path.exists(resolved[field]):
            raise FileNotFoundError(f"{place}: {_not_there(field, entry[field], resolved[field])}")
        if must_exist and kind.file_fields is not None and "://" not in resolved[field]:
            _check_kind(f"{place}: {field}", resolved[field], field in kind.file_fields)
    if "classes" in entry:
        resolved["classes"] = read_class_list(entry["classes"], place)
    _add_to_catalog(name, resolved, kind, place)


def _add_to_catalog(name: str, resolved: dict[str, Any], kind: EntryType, place: str) -> None:
    if name in DatasetCatalog.list():
        before = _registered.get(name)
        if before == resolved:
            return
        if before is None:
            raise ValueError(
                f"{place}: Detectron2 or other code has a dataset of this name already; choose another."
            )
        differing = sorted(key for key in {*before, *resolved} if before.get(key) != resolved.get(key))
        details = "; ".join(f"{key}: {before.get(key)!r} and {resolved.get(key)!r}" for key in differing)
        raise ValueError(f"{place}: two different datasets have this name ({details}).")
    if name in MetadataCatalog.list():
        # Left behind by a dataset that was removed; it would contradict the new one.
        MetadataCatalog.remove(name)
    kind.register(name, {key: value for key, value in resolved.items() if key not in _COMMON_FIELDS})
    _registered[name] = resolved


def _check_kind(place: str, path: str, file_wanted: bool) -> None:
    if os.path.isdir(path) == file_wanted:
        given, wanted = ("folder", "file") if file_wanted else ("file", "folder")
        raise ValueError(f"{place}: {path} is a {given}; a {wanted} is wanted.")


def _not_there(field: str, given: str, resolved: str) -> str:
    root = os.environ.get("DETECTRON2_DATASETS")
    try:
        os.fsencode(resolved)
    except UnicodeEncodeError as err:
        return (
            f"{field}: {resolved!a} cannot be looked for: names of files are in {err.encoding} for this Python, by the "
            "locale. Set PYTHONUTF8=1 before the command."
        )
    if os.path.isabs(os.path.expanduser(given)):
        return f"{field}: {resolved} does not exist."
    tried = f"DETECTRON2_DATASETS ({root})" if root else "DETECTRON2_DATASETS (not set)"
    return f"{field}: {given!r} exists neither under {tried} nor as {resolved}."


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
