"""Log to the terminal (rank 0, in colour) and to a file per process, without repeating oneself."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import IO, Any

from tabulate import tabulate
from termcolor import colored

from detectron2.utils.file_io import PathManager

__all__ = [
    "create_small_table",
    "log_every_n",
    "log_every_n_seconds",
    "log_first_n",
    "setup_logger",
]

_DATE = "%m/%d %H:%M:%S"
_LEVEL_COLOURS: dict[int, dict[str, Any]] = {
    logging.WARNING: {"color": "red", "attrs": ["blink"]},
    logging.ERROR: {"color": "red", "attrs": ["blink", "underline"]},
    logging.CRITICAL: {"color": "red", "attrs": ["blink", "underline"]},
}


class _ColorfulFormatter(logging.Formatter):
    """Shortens logger names and marks warnings and errors by colour."""

    def __init__(self, *args: Any, root_name: str = "", abbrev_name: str = "", **kwargs: Any) -> None:
        self._root = f"{root_name}."
        self._short = f"{abbrev_name}." if abbrev_name else ""
        super().__init__(*args, **kwargs)

    def formatMessage(self, record: logging.LogRecord) -> str:
        # A copy: other handlers see the same record and want the full name.
        shown = logging.makeLogRecord(record.__dict__)
        shown.name = record.name.replace(self._root, self._short)
        line = super().formatMessage(shown)
        look = _LEVEL_COLOURS.get(record.levelno)
        return line if look is None else f"{colored(record.levelname, **look)} {line}"


class _FileHandler(logging.StreamHandler):
    """On a full disk: one line on stderr, where logging has a traceback for every record. Nothing else happens."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        err = sys.exc_info()[1]
        if not isinstance(err, OSError):
            super().handleError(record)
        elif not self._told and sys.stderr is not None:
            name = getattr(self.stream, "name", "the log")
            print(f"{name} cannot be written, and misses lines from now on: {err}", file=sys.stderr)
            self._told = True


@functools.lru_cache
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Set up the logger ``name``; calling it again with the same arguments changes nothing.

    Args:
        output: folder for ``log.txt``, or a file that ends in ``.txt`` or ``.log``; None for no file. Other
            ranks write ``log.txt.rankN``.
        distributed_rank: only rank 0 writes to the terminal.
        color: for the terminal; the file is plain.
        name: logger to set up; its children inherit.
        abbrev_name: shown instead of ``name``; "" hides it. Default: "d2" for detectron2.
        enable_propagation: also hand records to the loggers above.
        configure_stdout: False leaves the terminal alone.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    short = abbrev_name if abbrev_name is not None else ("d2" if name == "detectron2" else name)

    plain = logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt=_DATE)
    if configure_stdout and distributed_rank == 0:
        formatter: logging.Formatter = plain
        if color:
            stamp = colored("[%(asctime)s %(name)s]: ", "green")
            formatter = _ColorfulFormatter(
                stamp + "%(message)s", _DATE, root_name=name, abbrev_name=str(short)
            )
        if hasattr(sys.stdout, "reconfigure"):
            # A terminal that is not UTF-8 shows a class name in escapes, instead of losing the line.
            sys.stdout.reconfigure(errors="backslashreplace")
        _add_handler(logger, logging.StreamHandler(stream=sys.stdout), formatter)
    if output is not None:
        file = _log_file(output, distributed_rank)
        PathManager.mkdirs(os.path.dirname(file))
        _add_handler(logger, _FileHandler(_open_log_stream(file)), plain)
    return logger


def _add_handler(logger: logging.Logger, handler: logging.Handler, formatter: logging.Formatter) -> None:
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(formatter)
    logger.addHandler(handler)


def _log_file(output: str, rank: int) -> str:
    file = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    return f"{file}.rank{rank}" if rank > 0 else file


@functools.cache
def _open_log_stream(filename: str) -> IO[str]:
    """One stream per file, shared by loggers; line by line on local disks, so that a crash loses nothing."""
    if "://" in filename:
        stream = PathManager.open(filename, "a", buffering=1 << 20)
    else:
        stream = PathManager.open(filename, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
    atexit.register(_close, stream)
    return stream


def _close(stream: IO[str]) -> None:
    with contextlib.suppress(OSError):  # a full disk: told already
        stream.close()


# ---- limits on repetition: counted per place in the caller's code, or per message, or both

_calls: Counter[Hashable] = Counter()
_last_time: dict[Hashable, float] = {}


def _caller() -> tuple[str, tuple[Hashable, ...]]:
    """Module name and place of the code that called a public function of this file."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "")
    place = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
    return ("detectron2" if module == "__main__" else module), place


def log_first_n(
    lvl: int, msg: str, n: int = 1, *, name: str | None = None, key: str | tuple[str, ...] = "caller"
) -> None:
    """Log the first ``n`` times only.

    Args:
        lvl: level, e.g. ``logging.WARNING``.
        name: logger; default: the caller's module.
        key: what counts as the same: "caller" (the line of code), "message", or both in a tuple.
    """
    keys = (key,) if isinstance(key, str) else tuple(key)
    if not keys or any(k not in ("caller", "message") for k in keys):
        raise ValueError(f'key={key!r}: use "caller", "message", or a tuple of them.')
    module, place = _caller()
    same: tuple[Hashable, ...] = ("first",)
    if "caller" in keys:
        same += place
    if "message" in keys:
        same += (msg,)
    _calls[same] += 1
    if _calls[same] <= n:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Log the 1st, (n+1)th, (2n+1)th ... time that this line of code is reached."""
    module, place = _caller()
    same = ("every", *place)
    _calls[same] += 1
    if n == 1 or _calls[same] % n == 1:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Log unless this line of code has logged within the last ``n`` seconds."""
    module, place = _caller()
    now, before = time.monotonic(), _last_time.get(place)
    if before is None or now - before >= n:
        logging.getLogger(name or module).log(lvl, msg)
        _last_time[place] = now


def create_small_table(small_dict: Mapping[str, Any]) -> str:
    """A table with one column per key and one row; good for up to about ten entries."""
    return tabulate(
        [list(small_dict.values())],
        headers=list(small_dict),
        tablefmt="pipe",
        floatfmt=".3f",
        stralign="center",
        numalign="center",
    )


def _log_api_usage(identifier: str) -> None:
    """Report the use of a feature to PyTorch's own logging, as PyTorch's libraries do. A no-op by default."""
    import torch

    torch._C._log_api_usage_once("detectron2." + identifier)
