"""Who writes into a folder: one process at a time, and a dead one blocks nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import Flags

from d2_frozen import claims
from d2_frozen.claims import CLAIM_FILE, InUseError, claimed
from d2_frozen.train_net import main, setup

_HOLD = """
import sys, time
from d2_frozen.claims import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PATIENCE_S", 0.6)
    monkeypatch.setattr(claims, "_LOOK_S", 0.05)
    monkeypatch.setattr(claims, "_dead", set())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / CLAIM_FILE


@pytest.fixture
def other(file: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the claim."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    with process:  # closes its pipes, and waits
        pass


def left_behind(file: Path, **facts: object) -> None:
    """The file of a process that did not remove it."""
    with claimed(file):
        owner = json.loads(file.read_text())
    file.touch()
    own = claims._identity(file.stat())
    file.write_text(json.dumps({**owner, "token": "another", "file": own, **facts}))


def test_a_second_process_is_refused_until_the_first_ends(file: Path, other: subprocess.Popen) -> None:
    host = json.loads(file.read_text())["host"]
    with (
        pytest.raises(
            InUseError, match=rf"{file.parent} is in use by process {other.pid} on {host}, since.*Go"
        ),
        claimed(file, advice="Go away."),
    ):
        pass
    assert other.stdin is not None
    threading.Timer(0.3, other.stdin.close).start()
    with claimed(file, wait=True):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


linux = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a process is watched, as those of other machines"
)


@linux
def test_a_killed_process_blocks_nobody(file: Path, other: subprocess.Popen, monkeypatch) -> None:
    """Nor one that nobody has buried yet; and nobody waits."""
    monkeypatch.setattr(claims, "PATIENCE_S", float("inf"))
    other.send_signal(signal.SIGKILL)
    time.sleep(0.2)
    assert file.exists() and other.returncode is None
    with claimed(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()


@linux
def test_a_copy_of_a_folder_is_not_that_of_the_process_that_works_on_it(
    file: Path, tmp_path: Path, other: subprocess.Popen
) -> None:
    copy = tmp_path.with_name(f"{tmp_path.name}_copy")
    shutil.copytree(tmp_path, copy)
    with claimed(copy / CLAIM_FILE), pytest.raises(InUseError, match=f"process {other.pid}"), claimed(file):
        pass


@linux
def test_another_process_with_the_number_of_a_dead_one_is_told_apart(file: Path, monkeypatch) -> None:
    monkeypatch.setattr(claims, "PATIENCE_S", float("inf"))
    left_behind(file, started="1")
    with claimed(file):
        pass
    assert not file.exists()


@pytest.mark.parametrize("clock", [-1e6, 0.0, 1e6])
def test_a_process_of_another_machine_is_watched(file: Path, clock: float) -> None:
    """Its clock does not matter: what counts is whether the file changes."""
    left_behind(file, machine="another", host="node7")
    end = threading.Event()

    def live() -> None:
        for beat in range(1000):
            if end.wait(0.1):
                return
            os.utime(file, (0, time.time() + clock - beat))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(InUseError, match="on node7"), claimed(file):
            pass
    finally:
        end.set()
        thread.join()
    with claimed(file):  # it is silent now
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_who_waits_for_another_machine_is_told_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    left_behind(file, machine="another", host="node7")
    beats = iter(range(8))

    def live() -> None:
        for beat in beats:
            time.sleep(0.1)
            os.utime(file, (0, beat))
        file.unlink()

    thread = threading.Thread(target=live)
    thread.start()
    with claimed(file, wait=True):
        thread.join()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "may be in use" in told[0] and "waiting for its end" in told[1]


@pytest.mark.parametrize("content", ["", '{"host": ', '{"pid": 1}'])
def test_a_file_that_does_not_say_whose_it_is_blocks_nobody(file: Path, content: str) -> None:
    """A disk that was full, or a machine that stopped between making and writing it."""
    file.write_text(content)
    with claimed(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_a_process_has_its_claim_as_often_as_it_wants_and_keeps_it_fresh(file: Path, monkeypatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.05)
    monkeypatch.setattr(claims, "_held", claims._Held())
    with claimed(file):
        with claimed(file.parent / "." / CLAIM_FILE):
            pass
        os.utime(file, (0, 0))
        end = time.monotonic() + 20
        while file.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert not file.exists()


def test_what_became_of_another_process_meanwhile_is_not_removed(file: Path) -> None:
    """Of two that find the same dead one, the slower must not remove the file of the faster."""
    left_behind(file, machine="another")
    dead = claims._read(file)
    left_behind(file, token="faster")
    claims._remove(file, dead[0])
    assert json.loads(file.read_text())["token"] == "faster"
    assert [path.name for path in file.parent.iterdir()] == [CLAIM_FILE]


def test_a_second_training_is_refused_before_it_writes_and_an_evaluation_is_not(
    flags: Flags, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with claimed(out / CLAIM_FILE):
        pid = os.getpid()
        refused = subprocess.run(
            [
                sys.executable,
                "-m",
                "d2_frozen.train_net",
                "--config-file",
                str(tmp_path / "tiny.yaml"),
                "--resume",
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
        )
        assert refused.returncode == 1
        assert f"{out} is in use by process {pid} on " in refused.stderr and "OUTPUT_DIR" in refused.stderr
        assert [path.name for path in out.iterdir()] == [CLAIM_FILE]
    left_behind(out / CLAIM_FILE, pid=1, started=claims._state(1)[1])
    with pytest.raises(InUseError, match="process 1 on "):
        main(flags())
    setup(flags("--eval-only"))
    assert (out / CLAIM_FILE).exists()
