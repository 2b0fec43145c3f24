"""What must hold of shards: nothing half-valid after a kill, several writers, damage is seen, limits hold."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2_frozen.caching import CacheFull, Store
from d2_frozen.caching import store as store_module
from d2_frozen.caching.store import ROW_BYTES, remove_shard


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def blob(number: int, size: int = 1000) -> bytes:
    return bytes([number % 251]) * size


def filled(folder: Path, numbers: range, **options) -> Store:
    store = Store(folder, **options)
    for number in numbers:
        store.append(key(number), [blob(number)])
    return store


def test_what_was_stored_is_read_and_mapped_by_others(tmp_path: Path) -> None:
    writer = filled(tmp_path, range(20))
    reader = Store(tmp_path)  # the writer's shard is still open
    assert len(reader) == 20 and reader.keys() == {key(n) for n in range(20)}
    for store in (writer, reader, pickle.loads(pickle.dumps(writer))):
        place = store.find(key(7))
        assert store.read(place) == blob(7) == bytes(store.map(place))
        assert place.offset % 64 == 0
    assert reader.find(key(99)) is None


def test_a_map_outlives_its_file(tmp_path: Path) -> None:
    store = filled(tmp_path, range(3))
    place = store.find(key(1))
    view = store.map(place)
    remove_shard(tmp_path, place.shard)
    assert bytes(view) == blob(1)
    assert Store(tmp_path).find(key(1)) is None


WRITER = """
import sys
from d2_frozen.caching import Store
store, first = Store(sys.argv[1]), int(sys.argv[2])
for number in range(first, first + int(sys.argv[3])):
    if number.to_bytes(16, "little") not in store:
        store.append(number.to_bytes(16, "little"), [bytes([number % 251]) * 1000])
        print(number, flush=True)
"""


def start_writer(folder: Path, first: int, count: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def assert_all_valid(store: Store) -> None:
    for one, place in store.places():
        assert store.read(place) == blob(int.from_bytes(one, "little"))


def test_a_killed_writer_leaves_whole_entries_and_another_goes_on(tmp_path: Path) -> None:
    writer = start_writer(tmp_path, 0, 10**6)
    for _ in range(50):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    left = Store(tmp_path)
    assert len(left) >= 50
    assert_all_valid(left)
    done = start_writer(tmp_path, 0, len(left) + 10)
    assert len(done.communicate()[0].splitlines()) == 10  # the others were there
    after = Store(tmp_path)
    assert after.keys() == {key(n) for n in range(len(left) + 10)} and after.duplicates == 0
    assert_all_valid(after)


def test_two_writers_at_once(tmp_path: Path) -> None:
    """They overlap in 100 keys, and may both write such a key; either copy is whole."""
    writers = [start_writer(tmp_path, first, 300) for first in (0, 200)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    store = Store(tmp_path)
    assert store.keys() == {key(n) for n in range(500)} and store.duplicates <= 100
    assert len(list(tmp_path.glob("*.bin"))) == 2
    assert_all_valid(store)


def test_others_are_seen_while_they_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_REFRESH_SECONDS", 0.0)
    reader, writer = Store(tmp_path), Store(tmp_path)
    assert reader.find(key(1)) is None
    writer.append(key(1), [b"one"])
    assert reader.read(reader.find(key(1))) == b"one"
    # A process that is forked off with a copy of the writer sees what the original writes after that.
    reader._writer = writer._writer
    writer._writer.pid = os.getpid() + 1
    writer.append(key(2), [b"two"])
    assert reader.read(reader.find(key(2))) == b"two" and reader.duplicates == 0


@pytest.mark.parametrize("cut", [1, ROW_BYTES - 1])
def test_half_a_row_is_none(tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, range(5)).close_shard()
    (rows,) = tmp_path.glob("*.idx")
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-cut])
    monkeypatch.setattr(store_module, "_REFRESH_SECONDS", 0.0)
    store = Store(tmp_path)
    assert len(store) == 4
    rows.write_bytes(whole)  # the other half comes later
    assert store.find(key(4)) is not None and len(store) == 5


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    filled(tmp_path, range(5)).close_shard()
    (blobs,) = tmp_path.glob("*.bin")
    content = bytearray(blobs.read_bytes())
    store = Store(tmp_path)
    content[store.find(key(2)).offset + 500] ^= 4
    blobs.write_bytes(content)
    assert [store.read(store.find(key(n))) is None for n in range(5)] == [False, False, True, False, False]
    (rows,) = tmp_path.glob("*.idx")
    content = bytearray(rows.read_bytes())
    content[3 * ROW_BYTES + 20] ^= 4
    rows.write_bytes(content)
    assert len(Store(tmp_path)) == 3  # nothing is believed behind a row that is not


def test_a_cut_shard_is_no_crash(tmp_path: Path) -> None:
    """A map behind the end of a file would end the process."""
    filled(tmp_path, range(5)).close_shard()
    (blobs,) = tmp_path.glob("*.bin")
    os.truncate(blobs, 2000)
    store = Store(tmp_path)
    place = store.find(key(4))
    assert store.read(place) is None and store.map(place) is None
    assert store.read(store.find(key(0))) == blob(0)


def test_a_damaged_entry_gives_way_to_another_of_the_same_key(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        writer = Store(tmp_path / "x")
        writer.append(key(1), [content])
    store = Store(tmp_path / "x")
    assert len(store) == 1 and store.duplicates == 1 and len(list(store.places())) == 2
    first = store.find(key(1))
    store.drop(key(1), first)
    second = store.find(key(1))
    assert {store.read(first), store.read(second)} == {b"first", b"second"}
    store.drop(key(1), second)
    store.refresh()
    assert store.find(key(1)) is None


def test_max_bytes_is_honoured_over_all_writers(tmp_path: Path) -> None:
    limit = 20_000
    stores = [Store(tmp_path / name, limit, limit_root=tmp_path) for name in ("a", "b")]
    with pytest.raises(CacheFull, match=r"MAX_GB"):
        for number in range(100):
            stores[number % 2].append(key(number), [blob(number)])
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert limit - 2 * 1100 < used <= limit
    assert stores[0].room()[0] == limit - used and "MAX_GB" in stores[0].room()[1]


def test_shards_are_closed_at_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 5000)
    store = filled(tmp_path, range(12))
    assert len(list(tmp_path.glob("*.bin"))) == 3
    assert_all_valid(store)
    monkeypatch.setattr(store_module, "_OPEN_MAPS", 1)
    views = [store.map(store.find(key(n))) for n in range(12)]
    assert [bytes(view) for view in views] == [blob(n) for n in range(12)]


def test_a_full_disk_is_said_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, range(3))
    usage = shutil.disk_usage(tmp_path)._replace(free=store_module.RESERVED_BYTES + 100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CacheFull, match="left free"):
            store.append(key(3), [blob(3)])
    # The disk that is full before it says so: half of the blob is written, then ENOSPC.
    write = os.write

    def half(handle: int, data: memoryview) -> int:
        if len(data) < 1000:
            raise OSError(28, "No space left on device")
        return write(handle, data[:500])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(CacheFull, match="no space left for"):
            store.append(key(3), [blob(3)])
    store.append(key(4), [blob(4)])
    after = Store(tmp_path)
    assert after.keys() == {key(n) for n in (0, 1, 2, 4)}
    assert_all_valid(after)


def test_no_lock_no_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A writer that stopped in the middle holds up nobody."""
    writer = start_writer(tmp_path, 0, 10**6)
    writer.stdout.readline()
    writer.send_signal(signal.SIGSTOP)
    try:
        with caplog.at_level(logging.WARNING):
            started = time.monotonic()
            filled(tmp_path, range(10**6, 10**6 + 20))
        assert time.monotonic() - started < 60 and not caplog.records
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
