"""Videos without code: DATASETS.REGISTER entries -> DatasetCatalog and MetadataCatalog.

    - {name: clips_train, type: video_list, list: PATH, root: DIR}      # "relative/path.mp4 label" lines
    - {name: clips_train, type: video_folder, root: DIR}                # DIR/CLASS/video.mp4

``classes`` (names, or a file) is optional: a list takes classes.txt or classes.json beside it, a folder the names of
its subfolders. ``root`` of a list is the list's folder if it is not given.
Records are {"file_name", "label", "video_id", "image_id"}: the number in the set, and the path as the list has it, by
which Detectron2's tools and DATASETS.SUBSET know it. MetadataCatalog.get(name).classes has the class names.
"""

from __future__ import annotations

import os
from typing import Any

from d2_frozen.data.register import entry_type, read_class_list
from detectron2.data import DatasetCatalog, MetadataCatalog
from video_app.data.lists import VIDEOS, folder_classes, folder_list, read_list

_LOOKED_AT = 50


def load_video_list(
    list_file: str, root: str | None = None, classes: list[str] | None = None, name: str = ""
) -> list[dict[str, Any]]:
    """Records of a "path label" list.

    Args:
        classes: their names; those of a file beside the list, else "0", "1", ... if None.
        name: of a dataset whose metadata get the classes; "" for none.
    Raises:
        ValueError: a malformed line, or a label beyond the classes.
        FileNotFoundError: not one of the first videos is there.
    """
    pairs = read_list(list_file)
    root = root if root is not None else os.path.dirname(os.path.abspath(list_file))
    classes = classes or classes_beside(list_file)
    highest = max(label for _, label in pairs)
    if classes is None:
        classes = [str(label) for label in range(highest + 1)]
    if highest >= len(classes):
        path = next(path for path, label in pairs if label == highest)
        raise ValueError(
            f"{list_file} has the label {highest}, but there are {len(classes)} classes, from 0 on ({path})."
        )
    return _records(pairs, root, classes, name, list_file)


def load_video_folder(root: str, classes: list[str] | None = None, name: str = "") -> list[dict[str, Any]]:
    """Records of ``root/CLASS/video``; the subfolders are the classes, in sorted order, if ``classes`` is None.

    Raises:
        ValueError: no subfolders, no videos, or a subfolder that is no class; all are called train, val and so on.
    """
    found = folder_classes(root, any_names=classes is not None)
    classes = classes or found
    strange = sorted(set(found) - set(classes))
    if strange:
        raise ValueError(f"{root} has the folders {', '.join(strange[:5])}, which are not among the classes.")
    pairs = folder_list(root, classes)
    if not pairs:
        raise ValueError(
            f"{root}: no videos in its subfolders. Files with {', '.join(VIDEOS)} are videos, and so is a folder of "
            "pictures: CLASS/VIDEO/*.jpg."
        )
    return _records(pairs, root, classes, name, root)


def _records(
    pairs: list[tuple[str, int]], root: str, classes: list[str], name: str, place: str
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [
        {"file_name": os.path.join(root, path), "label": label, "video_id": number, "image_id": path}
        for number, (path, label) in enumerate(pairs)
    ]
    # Looking for all of Kinetics takes minutes on a network disk; a wrong root shows in the first files.
    looked_at = records[:_LOOKED_AT]
    if not any(os.path.exists(record["file_name"]) for record in looked_at):
        raise FileNotFoundError(
            f"{place}: of the first {len(looked_at)} videos none is there; the first is looked for as "
            f"{records[0]['file_name']}. Paths are relative to root, {root}."
        )
    if name:
        MetadataCatalog.get(name).classes = classes
    return records


def classes_beside(list_file: str) -> list[str] | None:
    """Names in classes.txt or classes.json beside a list; None if there is neither."""
    for file_name in ("classes.txt", "classes.json"):
        path = os.path.join(os.path.dirname(os.path.abspath(list_file)), file_name)
        if os.path.isfile(path):
            return read_class_list(path, list_file)
    return None


@entry_type(
    "video_list",
    required=("list",),
    optional=("root", "classes"),
    path_fields=("list", "root"),
    file_fields=("list",),
)
def _register_video_list(name: str, fields: dict[str, Any]) -> None:
    list_file, root, classes = fields["list"], fields.get("root"), fields.get("classes")
    DatasetCatalog.register(name, lambda: load_video_list(list_file, root, classes, name))
    MetadataCatalog.get(name).set(list_file=list_file, evaluator_type="video")


@entry_type("video_folder", required=("root",), optional=("classes",), path_fields=("root",), file_fields=())
def _register_video_folder(name: str, fields: dict[str, Any]) -> None:
    root, classes = fields["root"], fields.get("classes")
    DatasetCatalog.register(name, lambda: load_video_folder(root, classes, name))
    MetadataCatalog.get(name).set(video_root=root, evaluator_type="video")
