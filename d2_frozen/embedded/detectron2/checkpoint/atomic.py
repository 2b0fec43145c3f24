"""Replace a file in one step: whoever is killed leaves the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import IO, Any


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Write beside ``path``, flush to the disk, then rename.

    Args:
        path: a local file; its folder exists.
        write: gets the open binary stream.
    Raises:
        OSError: the disk is full or not writable; names ``path``, which is as it was.
    """
    folder, name = os.path.split(os.path.abspath(path))
    # The process id keeps two runs in one folder from writing into the same temporary file.
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            try:
                os.fsync(stream.fileno())
            except OSError as err:
                # Some file systems over a network cannot.
                if err.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
        os.replace(temporary, path)
    except BaseException as err:
        if os.path.exists(temporary):
            os.remove(temporary)
        # torch.save buries a disk's error under one of its own.
        cause = err if isinstance(err, OSError) else err.__context__
        if isinstance(err, (OSError, RuntimeError)) and isinstance(cause, OSError):
            raise type(cause)(
                cause.errno, f"{cause.strerror or cause}; it is as it was before", path
            ) from err
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make the rename itself survive a power cut, where the system allows it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse
        return
    finally:
        os.close(handle)
