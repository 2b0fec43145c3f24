"""Videos -> pixels, by a process of its own that is killed when it hangs: what a loader worker uses.

    decoder = ClipDecoder(VideoReading(reader="auto", timeout_s=30))
    clip = decoder.read("a.mp4", SamplingPlan(frames=16, stride=4))     # clip.frames: (K, T, H, W, 3) uint8

The process is a plain child with pipes, not multiprocessing: loader workers are daemons, which may not have children
of that kind. It is started at the first video, lives as long as the worker, and is replaced after ``recycle_after``
videos.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from video_app.clips.decoder_process import HEADER
from video_app.clips.reader import order_for_file, reader_order
from video_app.clips.sampling import SamplingPlan

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Starting Python and loading a reader is not the file's time.
_START_S = 60.0


class BadClip(RuntimeError):
    """No reader can make a clip of this file. The message says what each of them said."""

    says_what_to_do = True


@dataclass(frozen=True)
class VideoReading:
    """How files are read.

    Args:
        reader: VIDEO.READER.
        short_side_px: shorter side after decoding; 0 keeps the size.
        timeout_s: for one file and one reader; after it the process is killed.
        folder_fps: rate of folders of pictures.
        recycle_after: videos after which a new process takes over.
    """

    reader: str = "auto"
    short_side_px: int = 256
    timeout_s: float = 30.0
    folder_fps: float = 30.0
    recycle_after: int = 1000

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.folder_fps <= 0 or self.recycle_after < 1 or self.short_side_px < 0:
            raise ValueError(f"{self}: times and rates are above 0, counts at least 1, sizes 0 or more.")


@dataclass(frozen=True)
class DecodedClip:
    """``claimed`` frames by the container, of which ``held`` decode as far as reading has shown; times in seconds.

    ``fault``: what the first reader said, if the second had to step in.
    """

    frames: np.ndarray  # (K, T, H, W, 3) uint8, RGB
    indices: np.ndarray  # (K, T)
    claimed: int
    held: int
    fps: float
    duration_s: float
    rotation_deg: int
    reader: str
    fault: str = ""


class ClipDecoder:
    """One long-lived decoding process. Threads take turns; copies in other processes start their own."""

    def __init__(self, reading: VideoReading):
        """
        Raises:
            ValueError: the reader is unknown or not installed.
        """
        self.reading = reading
        self.readers = reader_order(reading.reader)
        self._child: _Child | None = None
        self._lock, self._lock_of = threading.Lock(), os.getpid()

    def read(self, path: str, plan: SamplingPlan) -> DecodedClip:
        """
        Raises:
            BadClip: no reader makes a clip of it: missing, broken, too slow, or it crashes the decoder.
            RuntimeError: no reader starts at all, which is not the file's fault.
        """
        if self._lock_of != os.getpid():  # forked, perhaps while a thread of the parent held it
            self._lock, self._lock_of = threading.Lock(), os.getpid()
        with self._lock:
            return self._read(path, plan)

    def _read(self, path: str, plan: SamplingPlan) -> DecodedClip:
        said: list[str] = []
        no_reader = passed_on = 0
        auto = self.reading.reader == "auto"
        for reader in order_for_file(self.readers, path) if auto else self.readers:
            try:
                answer, frames = self._ask(path, plan, reader)
            except _Died as err:
                said.append(f"{reader}: {err}")
                continue
            if frames is not None:
                return DecodedClip(
                    frames,
                    np.array(answer.pop("indices")),
                    fault="; ".join(said) if len(said) > passed_on else "",
                    **_without(answer, "shape"),
                )
            no_reader += answer["kind"] == "reader"
            passed_on += auto and answer["kind"] == "other"
            said.append(f"{reader}: {answer['error']}")
            if not os.path.exists(path):
                break  # nothing that another reader could do
        if no_reader == len(said):
            raise RuntimeError(
                f"no video reader works here. {'; '.join(said)}. Choose another with VIDEO.READER."
            )
        raise BadClip("; ".join(said))

    def _ask(self, path: str, plan: SamplingPlan, reader: str) -> tuple[dict[str, Any], np.ndarray | None]:
        child = self._child
        if child is not None and (child.owner != os.getpid() or child.videos >= self.reading.recycle_after):
            self.close()
            child = None
        if child is None:
            child = self._child = _Child()
        used = child.videos > 0
        request = {
            "path": os.path.abspath(path),
            "reader": reader,
            "plan": dataclasses.asdict(plan),
            "short_side_px": self.reading.short_side_px,
            "folder_fps": self.reading.folder_fps,
            "timeout_s": self.reading.timeout_s,
        }
        try:
            return child.ask(request, self.reading.timeout_s)
        except _Died as err:
            self.close()
            if not used or isinstance(err, _TooSlow):
                raise
            # It may have died of something else: too little memory, a kill, an earlier file.
            return self._ask(path, plan, reader)
        except BaseException:
            # Also on Ctrl-C: half an answer is left in the pipe.
            self.close()
            raise

    @property
    def process_id(self) -> int | None:
        """Of the decoding process; None before the first video."""
        return self._child._process.pid if self._child is not None else None

    def close(self) -> None:
        """End the process; the next read starts another."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def __getstate__(self) -> dict[str, Any]:
        return {"reading": self.reading, "readers": self.readers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _child=None, _lock=threading.Lock(), _lock_of=os.getpid())


class _Died(Exception):
    """The process crashed, or was killed since it took too long."""


class _TooSlow(_Died):
    """The latter."""


class _Child:
    def __init__(self) -> None:
        self.owner = os.getpid()
        self.videos = 0
        self._started: set[str] = set()  # readers that it has loaded
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed in end()
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "video_app.clips.decoder_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], np.ndarray | None]:
        assert self._process.stdin is not None
        text = json.dumps(request).encode()
        deadline = time.monotonic() + timeout_s + (0.0 if request["reader"] in self._started else _START_S)
        self._started.add(request["reader"])
        self.videos += 1
        try:
            self._process.stdin.write(HEADER.pack(len(text), 0) + text)
        except (BrokenPipeError, ConnectionError):
            raise _Died(self._how_it_ended()) from None
        header = self._receive(HEADER.size, deadline, timeout_s).tobytes()
        text_bytes, pixel_bytes = HEADER.unpack(header)
        answer = json.loads(self._receive(text_bytes, deadline, timeout_s).tobytes())
        if not pixel_bytes:
            return answer, None
        return answer, self._receive(pixel_bytes, deadline, timeout_s).reshape(answer["shape"])

    def _receive(self, count: int, deadline: float, timeout_s: float) -> np.ndarray:
        assert self._process.stdout is not None
        data = np.empty(count, np.uint8)
        view, place = data.data, self._process.stdout.fileno()
        ready = select.poll()  # select itself takes no descriptors from 1024 on
        ready.register(place, select.POLLIN)
        got = 0
        while got < count:
            left = deadline - time.monotonic()
            if left <= 0 or not ready.poll(left * 1000):
                raise _TooSlow(f"took longer than {timeout_s:g} s and was killed")
            part = os.readv(place, [view[got:]])
            if not part:
                raise _Died(self._how_it_ended())
            got += part
        return data

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "the decoding process closed its output"
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"the decoding process ended {how}" + (f" ({lines[-1][:200]})" if lines else "")

    def end(self) -> None:
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        # A forked copy must not wait for a child that is not its own.
        self._process.returncode = self._process.returncode or 0


def _without(answer: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != key}
