"""Files that are whole or not there: what is written to a disk that fills up, or by a process that is killed."""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)


@contextmanager
def whole_file(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """A file beside ``path`` to write to. Where the block ends well it takes the place of ``path``, else it is removed.

    Args:
        durable: flush it to the disk before the renaming. Without, a crash of the machine may leave an empty file:
            enough for what can be made again.
    Yields:
        The other file: it exists, is empty, and readable for whom the user's files are.
    Raises:
        OSError: it cannot be written, because the disk is full, say; names ``path``, which is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        if partial.stat().st_mode != mode:
            partial.chmod(mode)  # some writers make files for their owner alone
        if durable:
            with open(partial, "rb") as written:
                sync(written.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as err:
        # torch.save, which cannot end its file on a full disk either, buries the disk's error under one of its own.
        cause = err if isinstance(err, OSError) else err.__context__
        if not isinstance(cause, OSError) or cause.filename not in (None, str(partial)):
            raise
        seen = f"{cause.strerror or cause}; not written, what was there is as before"
        raise type(cause)(cause.errno, seen, str(path)) from err
    finally:
        partial.unlink(missing_ok=True)


def sync(handle: int) -> None:
    """Flush an open file to the disk, where its file system can do that; some that lie over a network cannot."""
    try:
        os.fsync(handle)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let ``write(stream)`` fill a :func:`whole_file`."""
    with whole_file(path) as partial, open(partial, "wb") as stream:
        write(stream)


def write_bytes(path: str | Path, content: bytes, *, durable: bool = True) -> Path:
    """Fill a :func:`whole_file`; returns ``path``."""
    with whole_file(path, durable=durable) as partial:
        partial.write_bytes(content)
    return Path(path)


def write_text(path: str | Path, text: str, *, durable: bool = True) -> Path:
    """The same in UTF-8."""
    return write_bytes(path, text.encode(), durable=durable)


@contextmanager
def by_the_way(what: str) -> Iterator[None]:
    """For files that a run does not live by, such as pictures: where the block fails, the log says so.

    Args:
        what: has not happened then, e.g. "Pictures are not written".
    """
    try:
        yield
    except OSError as err:
        logger.error("%s: %s. The run goes on.", what, err)


def drop_half_line(path: str | Path) -> None:
    """Cut off the end of a file of lines that a kill or a full disk left without line break: the next one is whole."""
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "r+b") as file:
        end = keep = file.seek(0, os.SEEK_END)
        while keep:
            start = max(0, keep - 2**16)
            file.seek(start)
            found = file.read(keep - start).rfind(b"\n")
            keep = start + found + 1 if found >= 0 else start
            if found >= 0:
                break
        if keep != end:
            file.truncate(keep)


def walk(folder: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` over a user's data: through links to folders too, in the order of names, without hidden folders.

    A caller may clear the list of folders. A link to a folder that it lies in would have no end, and is left out.
    """
    for place, folders, files in os.walk(folder, followlinks=True):
        here = os.path.join(os.path.realpath(place), "")
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _leads_above(place, name, here)
        )
        yield place, folders, sorted(files)


def _leads_above(place: str, name: str, here: str) -> bool:
    path = os.path.join(place, name)
    return os.path.islink(path) and here.startswith(os.path.join(os.path.realpath(path), ""))
