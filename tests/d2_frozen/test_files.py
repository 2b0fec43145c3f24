"""A file is whole or not there, and as readable as any other of the user's."""

import errno
import importlib
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2_frozen import engine_name
from d2_frozen.files import drop_half_line, whole_file, write_atomically, write_bytes


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model_final.pth"
    target.write_bytes(b"old")

    def fail(stream) -> None:
        stream.write(b"half of the n")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(str(target), fail)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model_final.pth"]


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    """torch.save ends with an error about positions in its own file."""
    path = write_bytes(tmp_path / "model_final.pth", b"old")

    class FullDisk:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None:
            pass

    content = {"model": {"weight": torch.zeros(1000)}}
    with pytest.raises(OSError, match="No space left on device; not written.*model_final.pth") as full:
        write_atomically(path, lambda stream: torch.save(content, FullDisk()))
    assert full.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"not written.*{tmp_path}/missing/a.txt'"):
        write_bytes(tmp_path / "missing" / "a.txt", b"")


def test_errors_of_what_is_read_meanwhile_stay_as_they_are(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"directory: '.*source.txt'"),
        whole_file(tmp_path / "copy.txt"),
    ):
        (tmp_path / "source.txt").read_bytes()
    assert not list(tmp_path.iterdir())


def test_a_writer_that_makes_files_for_their_owner_alone(tmp_path: Path) -> None:
    """As safetensors' does, which replaces the file that it was given."""
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "w.safetensors") as partial:
            partial.unlink()
            save_file({"a": torch.zeros(1)}, str(partial))
            partial.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b""), (b"a\n", b"a\n"), (b"a\nb", b"a\n"), (b"half", b""), (b"a\n" + b"b" * 200_000, b"a\n")],
)
def test_half_a_line_at_the_end_is_cut_off(tmp_path: Path, before: bytes, after: bytes) -> None:
    """Or the next line would be glued to it, and both be lost."""
    path = tmp_path / "metrics.json"
    drop_half_line(path)
    assert not path.exists()
    path.write_bytes(before)
    drop_half_line(path)
    assert path.read_bytes() == after


@pytest.mark.parametrize(
    ("code", "written"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)]
)
def test_a_file_system_that_cannot_flush_is_written_to_and_one_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, written: bool
) -> None:
    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    writers = [write_atomically]
    if engine_name() == "embedded":
        writers.append(importlib.import_module("detectron2.checkpoint.atomic").write_atomically)
    for number, write in enumerate(writers):
        with nullcontext() if written else pytest.raises(OSError, match=os.strerror(code)):
            write(str(tmp_path / str(number)), lambda stream: stream.write(b"content"))
    found = [path.read_bytes() for path in tmp_path.iterdir()]
    assert found == ([b"content"] * len(writers) if written else [])
