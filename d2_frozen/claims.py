"""One process at a time: who writes into a folder says so in a small file there, and keeps it fresh.

No lock of the file system is asked for, as many network file systems have none. The file of a process that is dead
blocks nobody: on the same machine the system knows; of another machine nobody does, so the file is watched for
``PATIENCE_S``. Clocks are not compared, they may be apart.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

logger = logging.getLogger(__name__)

# The name of a run's claim in its folder.
CLAIM_FILE = ".in_use"
# Between two signs of life. A process may be silent for longer: reading a large json holds Python's lock.
BEAT_S = 10.0
PATIENCE_S = 120.0
# Between two looks at the file of another one.
_LOOK_S = 1.0


class InUseError(RuntimeError):
    """Another process holds the claim; says which."""


@contextlib.contextmanager
def claimed(path: str | Path, *, wait: bool = False, advice: str = "") -> Iterator[None]:
    """Hold the claim ``path`` for the block; a process that holds it already gets it again.

    Args:
        path: a file that nothing else uses; its folder exists.
        wait: until the one that holds it ends, instead of the error.
        advice: ends the text of the error.
    Raises:
        InUseError: another process holds it.
        OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    _take(path, wait, advice)
    try:
        yield
    finally:
        _give_back(path)


def holds_files(folder: Path) -> bool:
    """Is something in it but a claim, and what its holder has just begun to write?"""
    return any(
        not path.name.startswith(CLAIM_FILE) and path.suffix != ".partial" for path in folder.iterdir()
    )


@dataclass(frozen=True)
class _Owner:
    """Who holds a claim.

    machine: where ``pid`` means something: this start of the system, this container; "" if that cannot be told.
    started: of the process, so that another one of the same number is not taken for it.
    file: that was made, so that a copy of its folder is not taken for it.
    """

    host: str
    pid: int
    machine: str
    started: str
    since: str
    file: str = ""
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def this_process(cls) -> _Owner:
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _machine(), _state(pid)[1], since)

    @property
    def process(self) -> tuple[str, ...]:
        return self.host, str(self.pid), self.machine, self.started


class _Held:
    """Claims of this process, and the thread that keeps them fresh."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.owners: dict[Path, _Owner] = {}
        self.counts: dict[Path, int] = {}
        self.thread: threading.Thread | None = None

    def beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            with self.lock:
                owners = dict(self.owners)
            for path, owner in owners.items():
                found = _read(path)
                if found is not None and found[0] is not None and found[0].token != owner.token:
                    with self.lock:
                        lost = self.owners.pop(path, None) is not None
                    if lost:
                        logger.error(
                            "%s", _text(path, found[0], "was taken over: this process was taken for dead")
                        )
                    continue
                with contextlib.suppress(OSError):
                    try:
                        os.utime(path)
                    except OSError:  # file systems over object stores may have no such thing
                        path.write_text(json.dumps(asdict(owner)), encoding="utf-8")


_held = _Held()
# Processes that were found dead: a run has several claims.
_dead: set[tuple[str, ...]] = set()


def _take(path: Path, wait: bool, advice: str) -> None:
    global _held
    if _held.pid != os.getpid():  # forked: its claims are the parent's
        _held = _Held()
    if path in _held.counts:
        _held.counts[path] += 1
        return
    told = False
    while (owner := _created(path)) is None:
        found = _read(path)
        if found is None:
            continue  # gone meanwhile
        if not _lives(path, *found, tell=not told):
            _remove(path, found[0])
            continue
        if not wait:
            raise InUseError(f"{_text(path, found[0], 'is in use')}. {advice}".rstrip())
        if not told:
            logger.warning("%s; waiting for its end.", _text(path, found[0], "is in use"))
            told = True
        time.sleep(_LOOK_S)
    with _held.lock:
        _held.owners[path] = owner
    _held.counts[path] = 1
    if _held.thread is None:
        _held.thread = threading.Thread(target=_held.beat, name="claims", daemon=True)
        _held.thread.start()


def _give_back(path: Path) -> None:
    if _held.pid != os.getpid() or path not in _held.counts:  # given back at the end of the process
        return
    _held.counts[path] -= 1
    if _held.counts[path]:
        return
    del _held.counts[path]
    with _held.lock:
        owner = _held.owners.pop(path, None)
    found = _read(path)
    if owner is not None and found is not None and found[0] == owner:
        with contextlib.suppress(OSError):
            path.unlink()


@atexit.register
def _give_all_back() -> None:
    """Of a process that ends within a block, in a thread or a generator that nobody closes."""
    if _held.pid == os.getpid():
        for path in list(_held.counts):
            _held.counts[path] = 1
            _give_back(path)


# ---- the file


def _created(path: Path) -> _Owner | None:
    """This process as the owner; None if there is another one."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            owner = replace(_Owner.this_process(), file=_identity(os.fstat(file.fileno())))
            json.dump(asdict(owner), file)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    # Who found the same dead owner may have removed this file for its; it puts it back, or is faster.
    found = _read(path)
    return owner if found is not None and found[0] == owner else None


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}"


def _read(path: Path) -> tuple[_Owner | None, int] | None:
    """Whose it is, None for a file that does not say, and its time of change; None if there is none.

    By opening it: network file systems ask the server then, and otherwise what they remember.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        try:
            return None, path.stat().st_mtime_ns  # another user's, say
        except OSError:
            return None
    try:
        return _Owner(**json.loads(text)), changed
    except (ValueError, TypeError):  # is being written, or what a full disk left
        return None, changed


def _remove(path: Path, dead: _Owner | None) -> None:
    """Of a dead owner; if the file has become another's meanwhile, it stays."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    found = _read(aside)
    if found is not None and found[0] != dead and not path.exists():
        os.rename(aside, path)
    else:
        aside.unlink(missing_ok=True)


def _lives(path: Path, owner: _Owner | None, changed: int, tell: bool) -> bool:
    if owner is not None:
        if owner.process in _dead:
            return False
        if owner.machine and owner.machine == _machine():
            state, started = _state(owner.pid)
            if state == "dead" or (state == "lives" and started != owner.started):
                return False
            with contextlib.suppress(OSError):
                if state == "lives" and owner.file == _identity(path.stat()):
                    return True
    if tell:
        logger.warning(
            "%s. Waiting for a sign of life, for %.0f s at most.",
            _text(path, owner, "may be in use"),
            PATIENCE_S,
        )
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(min(_LOOK_S, PATIENCE_S))
        found = _read(path)
        if found is None:
            return False
        if found != (owner, changed):
            return True
    if owner is not None and owner.machine != _machine():
        _dead.add(owner.process)
    return False


def _text(path: Path, owner: _Owner | None, what: str) -> str:
    if owner is None:
        return f"{path.parent} {what} (by {path}, which does not say who)"
    return f"{path.parent} {what} by process {owner.pid} on {owner.host}, since {owner.since} ({path.name})"


# ---- processes


def _machine() -> str:
    """This start of this system, and the container: within it a process number is one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, str]:
    """("lives", "dead" or "unknown", when it was started, as the system counts)."""
    try:
        # PID (name) state ...; the name may hold anything.
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        # Of others, a system may show nothing.
        return ("unknown" if _answers(pid) else "dead"), ""
    return ("dead" if fields[0] in "ZX" else "lives"), fields[19]


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
