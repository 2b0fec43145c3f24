"""Which files cannot be read? ``OUTPUT_DIR/bad_clips.txt``: one line per file, path, tab, what the readers said.

Loader workers and ranks append to the same file, a line at a time. A file that is listed is not tried again, also
after a resume: a hanging file would cost its time limit in every epoch. Delete the line to try it again.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

FILE_NAME = "bad_clips.txt"
logger = logging.getLogger(__name__)


class BadClips:
    """The list as this process knows it: what the file held when it began, and what it added."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / FILE_NAME
        self._known = read_bad_clips(self.path)

    def reason(self, path: str) -> str | None:
        """Why ``path`` is on the list; None if it is not."""
        return self._known.get(path)

    def add(self, path: str, reason: str) -> None:
        if path in self._known:
            return
        reason = " ".join(reason.split())
        self._known[path] = reason
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending stays in one piece.
            place = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(place, f"{path}\t{reason}\n".encode(errors="surrogateescape"))
            finally:
                os.close(place)
        except OSError as err:  # a full disk, say: no reason to end a training
            logger.error("%s (%s) is not noted in %s: %s.", path, reason, self.path, err)

    def __len__(self) -> int:
        return len(self._known)


def read_bad_clips(path: str | Path) -> dict[str, str]:
    """{path: reason}; empty if there is no such file that can be read."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}  # a head that was trained elsewhere names a folder of that machine
    lines = (line.partition("\t") for line in text.splitlines())
    return {path: reason for path, _, reason in lines if path}
