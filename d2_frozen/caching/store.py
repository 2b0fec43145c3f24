"""Blobs by key in one folder, written by any number of processes, read through memory maps.

Every writer has shards of its own: NAME.bin, blobs one after the other, and NAME.idx, a row per blob: key, offset,
length, CRC-32 of the blob, CRC-32 of the row. Both only grow. A row is written when its blob is complete, so a writer
that is killed leaves at worst bytes that no row speaks of. Nobody waits for anybody: there are no locks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import secrets
import shutil
import socket
import struct
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from d2_frozen.files import sync

logger = logging.getLogger(__name__)

# A shard is what is mapped, and what `verify --repair` drops if a blob in it is damaged.
SHARD_BYTES = 256 * 2**20
# A cache never takes the last of a disk: other jobs save their checkpoints there.
RESERVED_BYTES = 2**30
_ALIGN = 64
_ROW = struct.Struct("<16sQQI")
_CHECK = struct.Struct("<I")
ROW_BYTES = _ROW.size + _CHECK.size
_OPEN_MAPS = 64
_REFRESH_SECONDS = 1.0
_SHARD_NAME = re.compile(r"^shard-[\w.-]+\.(bin|idx)$")


class Place(NamedTuple):
    """Where a blob lies: shard without suffix, offset and length in bytes, CRC-32."""

    shard: str
    offset: int
    length: int
    crc: int


class CacheFull(OSError):
    """Nothing more can be stored: MAX_GB is reached, or the disk is (nearly) full. Says which, with the numbers."""


class Store:
    """
    Args:
        folder: of the shards; made if it is not there.
        max_bytes: of all files under ``limit_root``; 0 for no limit but the disk's.
        limit_root: ``folder`` by default.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 0, limit_root: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self.limit_root = Path(limit_root) if limit_root is not None else self.folder
        self.duplicates = 0
        self._places: dict[bytes, Place] = {}
        self._others: dict[bytes, list[Place]] = {}  # more of the same key, in case one is damaged
        self._bad: set[Place] = set()
        self._read_until: dict[str, int] = {}
        self._refreshed = 0.0
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._writer: _ShardWriter | None = None
        self._used = 0
        self._measured = float("-inf")
        self.refresh()

    def __getstate__(self) -> dict:
        # A copy in another process reads; it must not write into this one's shard.
        return {**self.__dict__, "_maps": OrderedDict(), "_writer": None}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def keys(self) -> set[bytes]:
        """Of all blobs known so far."""
        return set(self._places)

    def places(self) -> Iterator[tuple[bytes, Place]]:
        """All blobs known so far, those that are there twice included."""
        yield from list(self._places.items())
        for key, places in list(self._others.items()):
            yield from ((key, place) for place in places)

    def find(self, key: bytes) -> Place | None:
        """The blob of a key; looks for what other processes have written, at most once a second."""
        place = self._places.get(key)
        if place is None and time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            self.refresh()
            place = self._places.get(key)
        return place

    def refresh(self) -> None:
        """Take in the rows that were written since the last time."""
        self._refreshed = time.monotonic()
        # A process that was forked from this one has a copy of its writer, and reads its rows as those of others.
        own = self._writer.shard if self._writer and self._writer.pid == os.getpid() else None
        for path in sorted(self.folder.glob("shard-*.idx")):
            if path.stem != own:
                self._take_in(path)

    def unreadable_rows(self) -> dict[str, int]:
        """Shard -> bytes of its rows that are not taken in, as one of them is damaged or not whole."""
        found = {}
        for path in self.folder.glob("shard-*.idx"):
            rest = path.stat().st_size - self._read_until.get(path.stem, 0)
            if rest and not (self._writer and self._writer.shard == path.stem):
                found[path.stem] = rest
        return found

    def _take_in(self, path: Path) -> None:
        start = self._read_until.get(path.stem, 0)
        try:
            with open(path, "rb") as file:
                file.seek(start)
                content = file.read()
        except FileNotFoundError:  # pruned meanwhile
            return
        done = 0
        for at in range(0, len(content) - ROW_BYTES + 1, ROW_BYTES):
            row = _unpacked(content[at : at + ROW_BYTES])
            if row is None:
                break  # half written; perhaps whole the next time
            key, offset, length, crc = row
            self._add(key, Place(path.stem, offset, length, crc))
            done = at + ROW_BYTES
        self._read_until[path.stem] = start + done

    def _add(self, key: bytes, place: Place) -> None:
        if place in self._bad:
            return
        first = self._places.setdefault(key, place)
        others = self._others.get(key, [])
        if first != place and place not in others:
            self.duplicates += 1
            self._others[key] = [*others, place]

    def drop(self, key: bytes, place: Place) -> None:
        """Forget a damaged blob, in this process; another one of the same key takes its place."""
        self._bad.add(place)
        others = [one for one in self._others.pop(key, []) if one != place]
        if self._places.get(key) == place:
            del self._places[key]
            if others:
                self._places[key] = others.pop(0)
        if others:
            self._others[key] = others

    def read(self, place: Place) -> bytes | None:
        """The blob, None if it is damaged, cut off or gone. Checked, and then in the system's page cache."""
        try:
            with open(self.folder / f"{place.shard}.bin", "rb") as file:
                file.seek(place.offset)
                blob = file.read(place.length)
        except OSError:
            return None
        return blob if len(blob) == place.length and zlib.crc32(blob) == place.crc else None

    def map(self, place: Place) -> memoryview | None:
        """The blob without reading or checking it, private to this process if written to; None if it is gone.

        Once mapped, it stays readable while the view is held, also if the file is deleted.
        """
        end = place.offset + place.length
        mapped = self._maps.get(place.shard)
        if mapped is None or len(mapped) < end:
            try:
                with open(self.folder / f"{place.shard}.bin", "rb") as file:
                    # Behind the end of a file a map is not an error but the end of the process.
                    if os.fstat(file.fileno()).st_size < end:
                        return None
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError:
                return None
            self._maps[place.shard] = mapped
        self._maps.move_to_end(place.shard)
        while len(self._maps) > _OPEN_MAPS:
            self._maps.popitem(last=False)
        return memoryview(mapped)[place.offset : end]

    def append(self, key: bytes, parts: list[memoryview | bytes]) -> None:
        """Store a blob, given in parts. Not for several threads at once.

        Raises:
            CacheFull: see there. What was there before stays valid.
            OSError: the folder cannot be written to.
        """
        length = sum(len(part) for part in parts)
        self._check_room(length)
        if self._writer is None or self._writer.size + length > SHARD_BYTES:
            self.close_shard()
            self._writer = _ShardWriter(self.folder)
        try:
            place = self._writer.append(key, parts, length)
        except OSError as err:
            self._abandon_shard()
            if err.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFull(f"no space left for {self.folder} ({err.strerror})") from err
            raise
        self._used += length + ROW_BYTES
        self._add(key, place)

    def close_shard(self) -> None:
        """Flush to the disk what this process has written; the next blob starts a shard."""
        if self._writer is not None:
            self._read_until[self._writer.shard] = self._writer.rows_end
            self._writer.close()
            self._writer = None

    def _abandon_shard(self) -> None:
        """After a failed write; the shard's complete blobs stay."""
        assert self._writer is not None
        self._read_until[self._writer.shard] = self._writer.rows_end
        with contextlib.suppress(OSError):
            self._writer.close(keep=self._writer.size)
        self._writer = None

    def used_bytes(self) -> int:
        """Of all files under ``limit_root``, measured now."""
        self._used = bytes_under(self.limit_root)
        self._measured = time.monotonic()
        return self._used

    def room(self) -> tuple[int, str]:
        """Bytes that can still be stored, and what sets the bound, in words."""
        free = max(0, shutil.disk_usage(self.folder).free - RESERVED_BYTES)
        disk = f"{gib(free)} are free on the disk of {self.folder}, apart from a reserve of {gib(RESERVED_BYTES)}"
        if not self.max_bytes:
            return free, disk
        left = max(0, self.max_bytes - self.used_bytes())
        if left <= free:
            return (
                left,
                f"{self.limit_root} holds {gib(self._used)} of at most {gib(self.max_bytes)} (MAX_GB)",
            )
        return free, disk

    def _check_room(self, length: int) -> None:
        wanted = length + ROW_BYTES
        if self.max_bytes:
            # Others write too: measured every half minute, and each time when the end is near.
            near = self._used + 64 * wanted > self.max_bytes
            if near or time.monotonic() - self._measured > 30:
                self.used_bytes()
            if self._used + wanted > self.max_bytes:
                raise CacheFull(
                    f"{self.limit_root} holds {gib(self._used)} of at most {gib(self.max_bytes)} (MAX_GB)"
                )
        free = shutil.disk_usage(self.folder).free
        if free < wanted + RESERVED_BYTES:
            raise CacheFull(
                f"{gib(free)} are free on the disk of {self.folder}, of which {gib(RESERVED_BYTES)} are left free"
            )


class _ShardWriter:
    """The growing shard of one process."""

    def __init__(self, folder: Path) -> None:
        # Unique over machines that share the folder, and over processes with equal ids in containers.
        host = re.sub(r"[^\w-]", "_", socket.gethostname())[:32]
        self.pid = os.getpid()
        self.shard = f"shard-{host}-{self.pid}-{secrets.token_hex(4)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._blobs = os.open(folder / f"{self.shard}.bin", flags, 0o666)
        try:
            self._rows = os.open(folder / f"{self.shard}.idx", flags, 0o666)
        except OSError:
            os.close(self._blobs)
            raise
        self.size = 0
        self.rows_end = 0

    def append(self, key: bytes, parts: list[memoryview | bytes], length: int) -> Place:
        start = self.size
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
            _write_all(self._blobs, part)
        filling = -(start + length) % _ALIGN
        _write_all(self._blobs, bytes(filling))
        _write_all(self._rows, _packed(key, start, length, crc))
        self.size = start + length + filling
        self.rows_end += ROW_BYTES
        return Place(self.shard, start, length, crc)

    def close(self, keep: int | None = None) -> None:
        """Args: keep: cut off what lies behind this many bytes of blobs."""
        try:
            if keep is not None:
                os.truncate(self._blobs, keep)
                os.truncate(self._rows, self.rows_end)
            sync(self._blobs)
            sync(self._rows)
        finally:
            os.close(self._blobs)
            os.close(self._rows)


def shard_files(folder: str | Path) -> list[Path]:
    """Files of the store in a folder; others, which it has not made, are not among them."""
    return sorted(path for path in Path(folder).iterdir() if _SHARD_NAME.match(path.name))


def remove_shard(folder: str | Path, shard: str) -> int:
    """Delete a shard, its rows first, so that no row is left without its blob; the bytes that were freed."""
    freed = 0
    for suffix in (".idx", ".bin"):
        path = Path(folder) / f"{shard}{suffix}"
        with contextlib.suppress(FileNotFoundError):
            freed += path.stat().st_size
            path.unlink()
    return freed


def bytes_under(folder: str | Path) -> int:
    """Of all files in a folder and those below it; files that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def gib(count: float) -> str:
    """A number of bytes as people read it: "1.50 GiB", below a GiB "12.3 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _packed(key: bytes, offset: int, length: int, crc: int) -> bytes:
    row = _ROW.pack(key, offset, length, crc)
    return row + _CHECK.pack(zlib.crc32(row))


def _unpacked(row: bytes) -> tuple[bytes, int, int, int] | None:
    facts = row[: _ROW.size]
    if _CHECK.unpack(row[_ROW.size :])[0] != zlib.crc32(facts):
        return None
    return _ROW.unpack(facts)


def _write_all(handle: int, data: memoryview | bytes) -> None:
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(handle, rest) :]
