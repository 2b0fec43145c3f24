"""Video files frame by frame, and annotated ones written, through PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

# The first that this build of FFmpeg has; the second is old, and plays everywhere too.
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
_PLAYS_EVERYWHERE = "yuv420p"


class VideoReader:
    """Iterating gives (seconds from the start, (H, W, 3) uint8 RGB) of every frame that can be decoded.

    What does not decode is left out, and so is what a cut file lacks; the frames around it are given.

    Attributes:
        rate: frames per second.
        frames: how many there are, as the file says or its length suggests; None where neither is known.
        damaged: how many packets did not decode the last time.
    Raises:
        ValueError: no video stream, or not a video at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{path} has no pictures in it: no video stream.")
                stream = container.streams.video[0]
                self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
                self.frames: int | None = stream.frames or None
                if self.frames is None and container.duration:
                    self.frames = max(1, round(container.duration / av.time_base * self.rate))
        except av.FFmpegError as err:
            raise ValueError(f"{path} cannot be read as a video: {err}") from err

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        self.damaged = 0
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            start: float | None = None  # many files do not begin at 0
            for number, frame in enumerate(self._decoded(container, stream)):
                seconds = float(frame.time) if frame.time is not None else float(number / self.rate)
                start = seconds if start is None else start
                seconds -= start
                yield seconds, _turned(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0))

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError:  # the container itself is damaged here; there is no way on
                self.damaged += 1
                return
            try:
                yield from packet.decode()
            except av.FFmpegError:
                self.damaged += 1


class VideoWriter:
    """An mp4 that is at its place only when it is complete: leave the ``with`` block without an error.

    Args:
        path: of the file.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
        self._rate = rate.limit_denominator(100_000)
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def add(self, picture: np.ndarray) -> None:
        """(H, W, 3) uint8 RGB; the size of the first frame holds for all."""
        if self._container is None:
            self._open(*picture.shape[:2])
        frame = av.VideoFrame.from_ndarray(self._even(picture), format="rgb24")
        self._put(self._stream.encode(frame))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._container is None:
            return
        try:
            if kind is None:
                self._put(self._stream.encode())
            self._container.close()
            if kind is None:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _open(self, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._partial), mode="w")
        self._stream = self._container.add_stream(_encoder(), rate=self._rate)
        # Colours are stored for 2x2 pixels: sides must be even.
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = _PLAYS_EVERYWHERE

    def _even(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        below, right = self._stream.height - height, self._stream.width - width
        if below < 0 or right < 0:
            picture = picture[: self._stream.height, : self._stream.width]
            below, right = max(0, below), max(0, right)
        return np.pad(picture, ((0, below), (0, right), (0, 0)), mode="edge")

    def _put(self, packets: list) -> None:
        for packet in packets:
            self._container.mux(packet)


def _encoder() -> str:
    for name in _ENCODERS:
        try:
            av.codec.Codec(name, "w")
        except ValueError:  # UnknownCodecError
            continue
        return name
    raise RuntimeError(f"this FFmpeg has none of the encoders {', '.join(_ENCODERS)}; use --no-pictures.")


def _turned(picture: np.ndarray, degrees: int) -> np.ndarray:
    """As a player shows it: phones store upright videos lying, with a note."""
    return np.ascontiguousarray(np.rot90(picture, round(degrees / 90) % 4)) if degrees else picture
