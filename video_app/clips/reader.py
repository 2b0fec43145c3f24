"""What is a video to the rest of the app? Frames by number, with the time at which each is shown.

    with open_clip(path, "decord") as clip:
        frames = clip.read([0, 4, 8], short_side_px=256)   # (3, H, W, 3) uint8, RGB

Readers: decord, pyav and torchcodec for files; ``folder`` for a folder of pictures. All give the same pixels: they
decode to RGB at full size, upright, and share one resize.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np

# Reader name -> (its module here, the package it needs), best first.
_READERS = {
    "decord": ("video_app.clips.reader_decord", "decord"),
    "pyav": ("video_app.clips.reader_pyav", "av"),
    "torchcodec": ("video_app.clips.reader_torchcodec", "torchcodec"),
}
READER_NAMES = tuple(_READERS)
# Here decord is right, and the fastest; in others it may scramble frames (reader_decord.py), and PyAV goes first.
_DECORD_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".3gp")


class ClipError(Exception):
    """This file cannot be read as video: what is wrong with it."""


class OtherReader(ClipError):
    """The file is fine, but not for this reader."""


class ReaderMissing(ImportError):
    """The reader itself is not installed or does not start; the file is not to blame."""


class Clip(ABC):
    """An open video. Frames are numbered in the order in which they are shown, from 0.

    Attributes:
        times_s: (N,) float64, ascending: when each frame is shown, the first at 0. N is the number of frames that
            the file says it holds; fewer may decode (:meth:`read`).
        rotation_deg: clockwise turn that the file asks for and that ``read`` has applied: 0, 90, 180 or 270.
    """

    reader: ClassVar[str]
    times_s: np.ndarray
    rotation_deg: int = 0

    @abstractmethod
    def read(self, indices: Sequence[int], short_side_px: int = 0) -> np.ndarray:
        """Frames in the order asked for; a number may come twice.

        Args:
            indices: each in [0, len(self)).
            short_side_px: height or width after resizing, whichever is shorter; 0 keeps the size.
        Returns:
            (T, H, W, 3) uint8, RGB.
        Raises:
            FewerFrames: the file ends before the last of ``indices``.
            ClipError: it does not decode.
        """

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def fps(self) -> float:
        """Mean frames per second; 0 for a single frame."""
        return (
            (len(self) - 1) / span
            if len(self) > 1 and (span := self.times_s[-1] - self.times_s[0]) > 0
            else 0.0
        )

    @property
    def duration_s(self) -> float:
        """To the end of the last frame, which is taken to be shown as long as the median frame."""
        return float(self.times_s[-1] + np.median(np.diff(self.times_s))) if len(self) > 1 else 0.0

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FewerFrames(ClipError):
    """The container claims more frames than it holds: ``held`` of them decode."""

    def __init__(self, held: int, claimed: int):
        super().__init__(f"{held} of the {claimed} frames that the container claims decode")
        self.held = held


def open_clip(path: str, reader: str, folder_fps: float = 30.0) -> Clip:
    """Open a video file with ``reader``, or a folder of pictures (then ``reader`` does not matter).

    Args:
        reader: one of ``READER_NAMES``.
        folder_fps: frames per second of a folder of pictures, which has no times of its own.
    Raises:
        ClipError: no such file, empty, not a video, no video stream in it, no frames.
        ReaderMissing: the package is not installed, or does not start.
    """
    if reader not in _READERS:
        raise ValueError(f"unknown reader {reader!r}; choose {', '.join(READER_NAMES)}.")
    if os.path.isdir(path):
        from video_app.clips.frame_folder import FrameFolder

        return FrameFolder(path, folder_fps)
    if not os.path.isfile(path):
        raise ClipError("no such file")
    if os.path.getsize(path) == 0:
        raise ClipError("the file is empty")
    module, package = _READERS[reader]
    try:
        opener = importlib.import_module(module).open_file
    except (ImportError, OSError, RuntimeError) as err:  # torchcodec without FFmpeg: RuntimeError
        first_line = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise ReaderMissing(
            f"the reader {reader} needs the package {package}, which does not load: {first_line}"
        ) from err
    clip = opener(path)
    if not len(clip):
        raise ClipError("no frames in it")
    return clip


def installed_readers() -> list[str]:
    """Names of readers whose package is there, best first. That it starts is seen at the first file."""
    return [name for name, (_, package) in _READERS.items() if importlib.util.find_spec(package) is not None]


def order_for_file(readers: list[str], path: str) -> list[str]:
    """``reader_order("auto")`` as it is for this file: PyAV before decord, but for the containers named above."""
    decord_first = readers[:2] == ["decord", "pyav"]
    return readers[::-1] if decord_first and not path.lower().endswith(_DECORD_SUFFIXES) else readers


def reader_order(choice: str) -> list[str]:
    """The reader to use, then the one to try where it fails. With "auto", see also :func:`order_for_file`.

    Args:
        choice: VIDEO.READER.
    Raises:
        ValueError: unknown, or not installed.
    """
    installed = installed_readers()
    if choice != "auto" and choice not in _READERS:
        raise ValueError(f"VIDEO.READER is {choice!r}; choose auto, {', '.join(READER_NAMES)}.")
    if choice != "auto" and choice not in installed:
        package = _READERS[choice][1]
        hint = ""
        if choice == "decord":
            hint = f" (decord has wheels for x86-64 Linux; this is {platform.machine()} {sys.platform})"
        there = f"Installed: {', '.join(installed)}." if installed else "No other reader is installed either."
        raise ValueError(
            f"VIDEO.READER is {choice}, but the package {package} is not installed{hint}. {there}"
        )
    if not installed:
        raise ValueError("no video reader is installed; pip install av (or decord, on x86-64 Linux).")
    first = installed[0] if choice == "auto" else choice
    return [first, *[name for name in installed if name != first]][:2]


def resize_short_side(frame: np.ndarray, short_side_px: int) -> np.ndarray:
    """(H, W, 3) -> the same picture with its shorter side ``short_side_px``; 0 keeps it."""
    height, width = frame.shape[:2]
    if short_side_px <= 0 or min(height, width) == short_side_px:
        return frame
    scale = short_side_px / min(height, width)
    return resize(frame, max(1, round(height * scale)), max(1, round(width * scale)))


def resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area means where it shrinks (no aliasing), linear where it grows."""
    if frame.shape[:2] == (height, width):
        return frame
    shrinks = height * width < frame.shape[0] * frame.shape[1]
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def upright(frame: np.ndarray, rotation_deg: int) -> np.ndarray:
    """Turn (H, W, 3) clockwise by 0, 90, 180 or 270 degrees."""
    return np.rot90(frame, -(rotation_deg // 90)) if rotation_deg else frame


def checked(indices: Sequence[int], count: int) -> list[int]:
    """As ints, all in [0, count)."""
    asked = [int(i) for i in indices]
    assert asked and min(asked) >= 0 and max(asked) < count, f"frames {asked} of {count}"
    return asked
