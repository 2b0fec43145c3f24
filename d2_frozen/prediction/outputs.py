"""The folder of a prediction run: what is written where, and how a run that was stopped goes on.

    DIR/run.json                        what made it: heads, size, how pictures are drawn
    DIR/done.jsonl                      a line per finished input, or per failed one with "error"
    DIR/HEAD/predictions.jsonl          a line per picture, frame or clip
    DIR/HEAD/coco.json                  detection: all of them in COCO's format
    DIR/HEAD/labels/NAME.png            segmentation: class ids (of videos: labels/NAME/FRAME.png)
    DIR/pictures/NAME.jpg, NAME.mp4     all heads drawn

An input counts as finished when its line is in done.jsonl, which is written last; lines of others in predictions.jsonl
are of a run that was stopped, and are removed when it goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np

from d2_frozen.claims import CLAIM_FILE, claimed
from d2_frozen.files import whole_file, write_bytes, write_text
from d2_frozen.prediction.heads import Head
from d2_frozen.prediction.inputs import Item
from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

_IN_USE = "Two runs would mix their lines. Wait for that one or stop it, or choose another --output."
_JPEG_QUALITY = 92
_LONGEST_JPEG_SIDE = 65500
# Of a config, sections that say nothing of what a trained head finds, and keys that do not. A video that takes long to
# read may be tried again with more time.
_OF_TRAINING = ("DATALOADER", "DATASETS", "GLOBAL", "SOLVER")
_NO_MATTER = {"MODEL": ("DEVICE", "WEIGHTS"), "VIDEO": ("RECYCLE_AFTER", "TIMEOUT")}


class OutputFolder:
    """Takes what came out, and knows what is there already.

    Args:
        folder: made if missing.
        heads: of the run.
        settings: what else decides results and drawings, as plain values.
        overwrite: begin anew, whatever is there.
    Raises:
        ValueError: the folder holds predictions of other heads or settings.
        InUseError: another run writes there.
        OSError: it cannot be made.
    """

    def __init__(
        self, folder: Path, heads: list[Head], settings: dict[str, Any], overwrite: bool = False
    ) -> None:
        self.folder = folder
        self.heads = {head.name: head for head in heads}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise type(err)(
                err.errno, f"--output cannot be a folder for results: {err.strerror}", str(folder)
            ) from err
        self._held = contextlib.ExitStack()
        self._held.enter_context(claimed(folder / CLAIM_FILE, advice=_IN_USE))
        try:
            self._go_on({"heads": {head.name: _facts(head) for head in heads}, **settings}, overwrite)
        except BaseException:
            self._held.close()
            raise
        self._files: dict[Path, TextIO] = {}
        # A failed input is noted by the thread that read it, others by the one that writes.
        self._lock = threading.Lock()

    def _go_on(self, made_by: dict[str, Any], overwrite: bool) -> None:
        self._claim(made_by, overwrite)
        done = self.folder / "done.jsonl"
        self._done = {line["file"]: line for line in read_lines(done) if "file" in line}
        # One line per input again, and none that a kill cut off.
        _write_lines(done, list(self._done.values()))
        for name in self.heads:
            (self.folder / name).mkdir(exist_ok=True)
            keep_lines(self.predictions(name), lambda line: self._finished(line["file"]))

    def predictions(self, head: str) -> Path:
        """The JSONL file of a head."""
        return self.folder / head / "predictions.jsonl"

    def has(self, item: Item) -> bool:
        """Was this very file finished before? Failed ones are tried again."""
        line = self._done.get(item.name, {})
        return "error" not in line and line.get("stamp") == item.stamp()

    def drop_stale(self, items: list[Item]) -> None:
        """Remove the lines of inputs that will be predicted again, because the file is another one now.

        Raises:
            ValueError: it is another one because it lies elsewhere, as ``1.jpg`` of two folders.
        """
        stale = {item.name for item in items if item.name in self._done and not self.has(item)}
        for item in items:
            before = Path(self._done.get(item.name, {}).get("path") or item.path.absolute())
            if before != item.path.absolute() and before.exists():
                raise ValueError(
                    f"{self.folder} holds results of {before} under the name {item.name}, which those of {item.path} "
                    "would replace. Choose another --output, or give both in one command, which names them apart."
                )
        if not stale:
            return
        for name in self.heads:
            keep_lines(self.predictions(name), lambda line: line["file"] not in stale)
        for name in stale:
            del self._done[name]
        _write_lines(self.folder / "done.jsonl", list(self._done.values()))

    def add(self, head: str, record: dict[str, Any]) -> None:
        """One line for predictions.jsonl; "file" in it is the item's name."""
        self._append(self.predictions(head), record)

    def picture_file(self, item: Item) -> Path:
        """Where the drawn picture or video goes."""
        return self.folder / "pictures" / f"{item.stem}{'.mp4' if item.is_video else '.jpg'}"

    def add_picture(self, item: Item, picture: np.ndarray) -> None:
        """(H, W, 3) uint8 RGB, as JPEG; made smaller where that cannot be so large."""
        path = self.picture_file(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        shrink = max(picture.shape[:2]) / _LONGEST_JPEG_SIDE
        if shrink > 1:
            height, width = (max(1, int(side / shrink)) for side in picture.shape[:2])
            logger.warning(
                "%s: a JPEG has %d pixels at most on a side; drawn at %dx%d. Files of results have the full size.",
                item.name, _LONGEST_JPEG_SIDE, width, height,
            )  # fmt: skip
            picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        code = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
        write_bytes(path, code.tobytes())

    def finish(self, item: Item, **facts: Any) -> None:
        """Everything of this input is written."""
        self._flush()
        stamp = item.stamp() if item.path.exists() else None
        line = {"file": item.name, "path": str(item.path.absolute()), "stamp": stamp, **facts}
        self._done[item.name] = line
        self._append(self.folder / "done.jsonl", line)
        self._flush()

    def collect(self) -> list[Path]:
        """Write the files that hold all results of a head (COCO json), in order of inputs' names; their paths."""
        self._close_files()
        written = []
        for name, head in self.heads.items():
            keep_lines(self.predictions(name), lambda line: self._finished(line["file"]))  # a video broke off
            if head.takes_clips:
                continue
            records = list(read_lines(self.predictions(name)))
            records.sort(key=lambda line: (line["file"], line.get("frame", -1)))
            path = head.prediction.collect(records, self.folder / name)  # type: ignore[union-attr]
            written += [path] if path else []
        return written

    def close(self) -> None:
        """Close the files; others may write into the folder."""
        self._close_files()
        self._held.close()

    def _close_files(self) -> None:
        while self._files:
            # What is finished was flushed. Other lines, which a full disk may not take, are removed when a run goes on.
            with contextlib.suppress(OSError):
                self._files.popitem()[1].close()

    def _finished(self, name: str) -> bool:
        return name in self._done and "error" not in self._done[name]

    def _claim(self, made_by: dict[str, Any], overwrite: bool) -> None:
        path = self.folder / "run.json"
        before = self._run_before(path, overwrite)
        if overwrite and before is not None:
            for name in ("run.json", "done.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            for folder in (*before.get("heads", ()), "pictures"):
                if (
                    Path(folder).name == folder != ".."
                ):  # nothing outside of the folder, whoever wrote the file
                    shutil.rmtree(self.folder / folder, ignore_errors=True)
            before = None
        if before is not None and before != made_by:
            differing = sorted(key for key in {*before, *made_by} if before.get(key) != made_by.get(key))
            raise ValueError(
                f"{self.folder} holds predictions of another run (differing: {', '.join(differing)} in run.json). "
                "Choose another --output, or --overwrite to begin anew."
            )
        if before is None:
            write_text(path, json.dumps(made_by, indent=1))

    def _run_before(self, path: Path, overwrite: bool) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(before, dict):
                return before
        except ValueError:
            pass
        if overwrite:
            return {}
        raise ValueError(
            f"{path} is not what a prediction run writes. Choose another --output, or --overwrite to replace it."
        )

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        with self._lock:
            if path not in self._files:
                self._files[path] = open(path, "a", encoding="utf-8")  # noqa: SIM115
            self._files[path].write(json.dumps(line) + "\n")

    def _flush(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.flush()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; nothing for a missing one. A last line that was cut off is left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                logger.warning("%s has a line that was cut off; it is left out.", path)


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only some lines of a JSONL file, and none that was cut off."""
    if not path.is_file():
        return
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in read_lines(path) if wanted(line))


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    if lines or path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _facts(head: Head) -> dict[str, Any]:
    """Other weights, or another config, make another head."""
    used = {
        name: {key: value for key, value in section.items() if key not in _NO_MATTER.get(name, ())}
        for name, section in head.cfg.items()
        if isinstance(section, CfgNode) and name not in _OF_TRAINING
    }
    path = Path(head.file)
    return {
        "task": head.task,
        "file": path.name,
        "sha256": _sha256(path) if path.is_file() else "",
        "config_sha256": hashlib.sha256(str(used).encode()).hexdigest(),
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
