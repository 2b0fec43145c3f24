"""``python -m seg_app.prepare ade20k``: the official release of ADE20K-150 into the layout that Detectron2 reads.

In: ADEChallengeData2016.zip (sceneparsing.csail.mit.edu), or the folder unpacked from it.
Out: DETECTRON2_DATASETS/ADEChallengeData2016/{images,annotations_detectron2}/{training,validation}.
Labels 0 (other objects) become 255 (ignored), 1..150 become 0..149. What an interrupted call has written is kept; a
file is written beside its place and renamed, so there are no halves.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from d2_frozen.cpus import usable_cpus
from d2_frozen.files import whole_file
from seg_app.data.ade20k import FOLDER, IMAGES, class_names, datasets_root

_CLASSES = 150


class ReleaseError(ValueError):
    """The given files are not the official release, or not all of it."""


def prepare_ade20k(
    root: str | Path, archive: str | Path | None = None, expected: dict[str, int] = IMAGES
) -> dict[str, int]:
    """Make, or complete, ``root/ADEChallengeData2016``.

    Args:
        root: DETECTRON2_DATASETS.
        archive: the zip; None where ``root/ADEChallengeData2016`` holds images/ and annotations/ already.
        expected: split -> number of images.
    Returns:
        Split -> number of label maps written now.
    Raises:
        ReleaseError: files are missing, or are no label maps of ADE20K-150, of which it names the first; the archive is
            cut, or another one.
        FileNotFoundError: neither archive nor folder.
    """
    folder = Path(root, FOLDER)
    if archive is not None:
        _unpack(Path(archive), folder)
    elif not (folder / "annotations").is_dir():
        raise FileNotFoundError(
            f"{folder / 'annotations'} does not exist. Unpack ADEChallengeData2016.zip into {root}, or give it "
            "with --zip."
        )
    written = {}
    for split, count in expected.items():
        labels = sorted((folder / "annotations" / split).glob("*.png"))
        _check_split(folder, split, labels, count)
        target = folder / "annotations_detectron2" / split
        target.mkdir(parents=True, exist_ok=True)
        todo = [path for path in labels if not (target / path.name).exists()]
        with ThreadPoolExecutor(max_workers=min(16, usable_cpus())) as pool:
            list(pool.map(lambda path: _convert(path, target / path.name), todo))  # noqa: B023
        written[split] = len(todo)
    return written


def shifted(numbers: np.ndarray, path: str | Path) -> np.ndarray:
    """(H, W) labels of the release -> class ids 0..149, 255 for 0.

    Raises:
        ReleaseError: values above 150, or colours.
    """
    if numbers.ndim != 2 or numbers.max(initial=0) > _CLASSES:
        seen = f"shape {numbers.shape}" if numbers.ndim != 2 else f"the value {numbers.max()}"
        raise ReleaseError(
            f"{path} has {seen}; label maps of ADE20K-150 have one channel of 0 to {_CLASSES}. (The full ADE20K data "
            "set has colour maps; this needs ADEChallengeData2016.)"
        )
    return np.where(numbers == 0, 255, numbers.astype(np.int16) - 1).astype(np.uint8)


def _convert(source: Path, target: Path) -> None:
    try:
        with Image.open(source) as image:
            numbers = np.array(image)
    except (OSError, SyntaxError) as err:
        raise ReleaseError(f"{source} cannot be read: {err}") from err
    labels = Image.fromarray(shifted(numbers, source))
    _write(target, lambda path: labels.save(path, format="PNG"))


def _check_split(folder: Path, split: str, labels: list[Path], count: int) -> None:
    images = {path.stem for path in (folder / "images" / split).glob("*.jpg")}
    stems = {path.stem for path in labels}
    for what, lacking in (("image", stems - images), ("label map", images - stems)):
        if lacking:
            first = min(lacking)
            raise ReleaseError(
                f"{folder}: {len(lacking)} files of {split} lack their {what}; the first is {first}."
            )
    if len(labels) != count:
        raise ReleaseError(f"{folder} has {len(labels)} label maps of {split}, the official release {count}.")


def _unpack(archive: Path, folder: Path) -> None:
    """images/ and annotations/ of the zip; files that are there with the right size are left alone."""
    try:
        _unpack_members(archive, folder)
    except zipfile.BadZipFile as err:
        raise ReleaseError(
            f"{archive} is cut, damaged, or no zip file: {err}. Download it again; what was unpacked is kept."
        ) from err


def _unpack_members(archive: Path, folder: Path) -> None:
    wanted = {(part, split) for part in ("images", "annotations") for split in IMAGES}
    found = 0
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            parts = PurePosixPath(member.filename).parts
            # Names are taken apart and put together again, so none can lead out of the folder.
            if member.is_dir() or len(parts) != 4 or parts[0] != FOLDER or parts[1:3] not in wanted:
                continue
            found += 1
            target = folder.joinpath(*parts[1:])
            if target.exists() and target.stat().st_size == member.file_size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)

            def copy(path: Path, member: zipfile.ZipInfo = member) -> None:
                with zipped.open(member) as source, open(path, "wb") as file:
                    shutil.copyfileobj(source, file)

            _write(target, copy)
        if not found:
            inside = sorted({PurePosixPath(name).parts[0] for name in zipped.namelist() if name})
            raise ReleaseError(
                f"{archive} has no {FOLDER}/images and annotations in it, but {', '.join(inside[:5]) or 'nothing'}; "
                "ADEChallengeData2016.zip is wanted."
            )


def _write(target: Path, write: Callable[[Path], object]) -> None:
    with whole_file(target, durable=False) as partial:
        write(partial)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m seg_app.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("dataset", choices=["ade20k"])
    parser.add_argument(
        "--root", default=datasets_root(), help="default: DETECTRON2_DATASETS, else datasets/"
    )
    parser.add_argument(
        "--zip", default=None, help="ADEChallengeData2016.zip, if it is not unpacked in the root"
    )
    args = parser.parse_args(None if arguments is None else list(arguments))
    try:
        written = prepare_ade20k(args.root, args.zip)
    except (ReleaseError, OSError) as err:
        sys.exit(f"{parser.prog}: {err}")
    for split, count in written.items():
        print(f"{split}: {IMAGES[split]} images, {count} label maps written now")
    print(f"{len(class_names())} classes; datasets ade20k_sem_seg_train and ade20k_sem_seg_val are ready")


if __name__ == "__main__":
    main()
