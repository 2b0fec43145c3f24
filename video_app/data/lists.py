"""Lists of labelled videos: "path label" lines, folders per class, and the csv files of the Kinetics release."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2_frozen.files import walk, write_bytes
from video_app.clips.frame_folder import PICTURES

VIDEOS = (
    *(".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts"),
    *(".mts", ".m2ts", ".ogv", ".gif"),
)
_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def read_list(path: str | Path) -> list[tuple[str, int]]:
    """(path as it stands there, label) of every line. The label is what follows the last blank, so paths may hold some.

    Empty lines and those that begin with # are left out.

    Raises:
        ValueError: a line that does not end in an integer of 0 or more; the list is empty.
    """
    pairs: list[tuple[str, int]] = []
    # Windows' editors begin a file with a mark that would be part of the first path.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, _, label = line.replace("\t", " ").rpartition(" ")
            if not name or not label.isdecimal():
                raise ValueError(
                    f'{path}, line {number}: {line!r} is not "path label" with a label of 0 or more.'
                )
            pairs.append((name.strip(), int(label)))
    if not pairs:
        raise ValueError(f'{path} names no video; its lines are "path label".')
    return pairs


def only_numbered(classes: Sequence[str]) -> bool:
    """Names that were made up from labels, so that their number says no more than the highest label."""
    return list(classes) == [str(label) for label in range(len(classes))]


def write_list(path: str | Path, pairs: Sequence[tuple[str, int]]) -> None:
    """Whole or not at all."""
    write_lines(path, [f"{name} {label}" for name, label in pairs])


def write_lines(path: str | Path, lines: Sequence[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode("utf-8", errors="surrogateescape"))


def folder_classes(root: str | Path, any_names: bool = False) -> list[str]:
    """Names of the subfolders, sorted: the classes.

    Raises:
        ValueError: there are none, or, without ``any_names``, all are called train, val and so on.
    """
    names = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise ValueError(f"{root} has no subfolders; one per class is expected.")
    if not any_names and {name.lower() for name in names} <= _PARTS:
        raise ValueError(
            f"{root} has the folders {', '.join(names)}, which are parts of a dataset, no classes. Give one of them "
            f"instead, e.g. {os.path.join(root, names[0])}; if your classes are called so, list them in `classes` of "
            "a DATASETS.REGISTER entry."
        )
    return names


def folder_list(root: str | Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Videos of ``root/CLASS/...``, sorted, with paths relative to ``root``. A folder of pictures is one video."""
    return [
        (os.path.relpath(video, root), label)
        for label, name in enumerate(classes)
        for video in sorted(videos_below(os.path.join(root, name)))
    ]


def videos_below(folder: str | Path) -> Iterator[str]:
    """Video files, and folders that hold pictures but no video file, at any depth.

    Pictures beside videos are thumbnails of them, not frames.
    """
    for place, folders, files in walk(folder):
        videos = [name for name in files if is_video(name)]
        pictures = [name for name in files if name.lower().endswith(PICTURES) and not name.startswith(".")]
        if place != str(folder) and pictures and not videos:
            yield place
            folders.clear()
            continue
        yield from (os.path.join(place, name) for name in videos)


def is_video(name: str) -> bool:
    return name.lower().endswith(VIDEOS) and not name.startswith(".")


@dataclass(frozen=True)
class KineticsClip:
    """A line of the release: the class, and the names under which downloaders save the clip, most exact first."""

    class_name: str
    stems: tuple[str, ...]


def read_kinetics_csv(path: str | Path) -> list[KineticsClip]:
    """Lines of the official csv: label, youtube_id, time_start, time_end, split.

    Raises:
        ValueError: the columns are missing, or a time is not a number.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        wanted = ("label", "youtube_id", "time_start", "time_end")
        missing = [name for name in wanted if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['nothing'])}. "
                "The test split of some releases comes without labels and cannot be used."
            )
        clips = []
        for number, row in enumerate(reader, 2):
            try:
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {number}: times are not numbers: {row}.") from None
            video = row["youtube_id"]
            clips.append(
                KineticsClip(
                    row["label"], (f"{video}_{start:06d}_{end:06d}", f"{video}_{start}_{end}", video)
                )
            )
    return clips
