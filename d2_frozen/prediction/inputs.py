"""What is there to predict? Files, folders -> items with unique names for their results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from d2_frozen.data.checks import more_than_8_bits
from d2_frozen.files import walk
from detectron2.data import detection_utils

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif", ".jfif")
VIDEOS = (
    ".mp4",
    ".avi",
    ".mov",
    ".mkv",
    ".webm",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ts",
    ".mts",
    ".m2ts",
    ".3gp",
    ".ogv",
)


@dataclass(frozen=True)
class Item:
    """One picture or video.

    Attributes:
        path: where it lies.
        name: relative to the folder that was given, or the file's own; unique.
        stem: the name without its suffix, where that is unique too; results are named by it.
        is_video: read frame by frame. A GIF is a video if it has more than one frame.
    """

    path: Path
    name: str
    stem: str
    is_video: bool

    def stamp(self) -> list[int]:
        """Size in bytes and time of change: another file under the same name has another."""
        status = self.path.stat()
        return [status.st_size, status.st_mtime_ns]


def find_items(inputs: Sequence[str | Path], output: str | Path | None = None) -> list[Item]:
    """Pictures and videos, in the order given and by name within a folder, subfolders included.

    Args:
        output: the folder for results. Where it lies inside a folder of inputs, nothing in it is an input: a run that
            goes on would predict its own pictures.
    Raises:
        FileNotFoundError: an input that is not there, or a folder without pictures and videos.
        ValueError: ``output`` is one of the folders.
    """
    found: list[tuple[Path, str]] = []
    results = None if output is None else Path(output).resolve()
    for given in map(Path, inputs):
        if given.is_dir():
            if given.resolve() == results:
                raise ValueError(
                    f"{given} is both an input and the folder for results. Choose another --output, such as "
                    f"{given / 'predictions'}."
                )
            inside = sorted(
                path
                for place, _, names in walk(given)
                for name in names
                if _is_media(path := Path(place, name))
            )
            if results is not None and given.resolve() in results.parents:
                inside = [path for path in inside if results not in path.resolve().parents]
            if not inside:
                raise FileNotFoundError(
                    f"{given} has no pictures ({', '.join(PICTURES)}) or videos ({', '.join(VIDEOS)})."
                )
            found += [(path, path.relative_to(given).as_posix()) for path in inside]
        elif given.exists():
            found.append((given, given.name))
        else:
            raise FileNotFoundError(f"no file or folder {given}.")
    once: dict[Path, tuple[Path, str]] = {}
    for path, name in found:
        once.setdefault(path.resolve(), (path, name))
    return _named(list(once.values()))


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as EXIF says.

    Raises:
        OSError, ValueError: it cannot be read, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            deep = more_than_8_bits(image)
    except Image.DecompressionBombError as err:
        raise ValueError(f"{err} Cut it into tiles.") from err
    except (OSError, SyntaxError, EOFError):
        deep = ""  # read_image says what is wrong
    if deep:
        raise ValueError(f"it has {deep}. Convert it to 8 bits, with the range that matters to you.")
    return np.ascontiguousarray(detection_utils.read_image(str(path), format="RGB"))


def _is_media(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() in PICTURES + VIDEOS and path.is_file()


def _is_animated(path: Path) -> bool:
    if path.suffix.lower() != ".gif":
        return False
    try:
        with Image.open(path) as image:
            return getattr(image, "is_animated", False)
    except Exception:  # whatever the bytes lead to; who reads the picture says what is wrong
        return False


def _named(found: list[tuple[Path, str]]) -> list[Item]:
    # Two files of one name from different places: the second gets its folder in front, then a number.
    names: list[str] = []
    taken: set[str] = set()
    for path, name in found:
        if name in taken:
            name = f"{path.resolve().parent.name}/{name}"
        stem, suffix = os.path.splitext(name)
        number = 2
        while name in taken:
            name, number = f"{stem}_{number}{suffix}", number + 1
        taken.add(name)
        names.append(name)
    stems = Counter(os.path.splitext(name)[0] for name in names)
    folders = {folder.as_posix() for name in names for folder in PurePosixPath(name).parents}
    items = []
    for (path, _), name in zip(found, names):
        stem = os.path.splitext(name)[0]
        is_video = path.suffix.lower() in VIDEOS or _is_animated(path)
        # Frames of a video go into a folder of its own, not into that of pictures which were cut out of it before.
        unique = stems[stem] == 1 and stem not in taken and not (is_video and stem in folders)
        items.append(Item(path, name, stem if unique else name, is_video))
    return items
