"""Video files by decord (x86-64 Linux wheels). It turns frames upright itself.

It numbers frames rightly in some files only, and gives others scrambled without a word: those are refused here, and
PyAV reads them. Wrong were avi, mpg and ts with B-frames, wmv, the end of some flv, and open GOPs in any container
(x265 makes such files if not told otherwise).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import decord
import numpy as np

from video_app.clips.reader import Clip, ClipError, OtherReader, checked, resize_short_side

decord.logging.set_level(decord.logging.QUIET)
# Frames of full size that are held at a time: 16 of 1080p are 100 MB.
_CHUNK_BYTES = 64 << 20
_WRONG_SUFFIXES = (".avi", ".wmv", ".asf", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".flv")
# As FFmpeg calls them, up to the first comma: mp4, m4v, mov and 3gp are one format, mkv and webm another.
_RIGHT_FORMATS = ("mov", "matroska")
# No video is that long. Times that FFmpeg did not know come out of decord as 1e14 s.
_LONGEST_S = 1e6
_USE_PYAV = "use the reader pyav for it"


class DecordClip(Clip):
    reader = "decord"

    def __init__(self, path: str):
        _refuse_what_is_scrambled(path)
        try:
            self._video = decord.VideoReader(path, num_threads=1)
            count = len(self._video)
            times = (
                self._video.get_frame_timestamp(range(count))[:, 0].astype(np.float64)
                if count
                else np.zeros(0)
            )
        except (decord.DECORDError, RuntimeError, IndexError, ValueError) as err:
            raise ClipError(f"decord: {_short(err)}") from err
        self.times_s = times - times[:1]
        if not (np.all(np.diff(times) > 0) and np.all(self.times_s < _LONGEST_S)):
            raise OtherReader(f"decord does not tell when the frames are shown; {_USE_PYAV}")

    def read(self, indices: Sequence[int], short_side_px: int = 0) -> np.ndarray:
        asked = checked(indices, len(self))
        distinct = sorted(set(asked))
        frames: dict[int, np.ndarray] = {}
        chunk = 1
        while distinct:
            now, distinct = distinct[:chunk], distinct[chunk:]
            try:
                pixels = self._video.get_batch(now).asnumpy()
            except (decord.DECORDError, RuntimeError, IndexError) as err:
                raise ClipError(f"decord: {_short(err)}") from err
            frames.update((i, resize_short_side(frame, short_side_px)) for i, frame in zip(now, pixels))
            chunk = max(1, _CHUNK_BYTES // pixels[0].nbytes)
        return np.stack([frames[i] for i in asked])

    def close(self) -> None:
        del self._video


def open_file(path: str) -> Clip:
    return DecordClip(path)


def _refuse_what_is_scrambled(path: str) -> None:
    """By name, and by content where PyAV is installed; a file that PyAV does not open is left to decord."""
    if path.lower().endswith(_WRONG_SUFFIXES):
        raise OtherReader(f"decord may scramble the frames of {path[path.rindex('.') :]} files; {_USE_PYAV}")
    if importlib.util.find_spec("av") is None:
        return
    from video_app.clips.reader_pyav import PyAVClip

    try:
        with PyAVClip(path) as packets:
            container, open_gops = packets.container, packets.open_gops
    except ClipError:
        return
    if container.split(",")[0] not in _RIGHT_FORMATS:
        raise OtherReader(f"decord may scramble the frames of this container ({container}); {_USE_PYAV}")
    if open_gops:
        raise OtherReader(f"decord scrambles frames where GOPs are open, as in this file; {_USE_PYAV}")


def _short(err: Exception) -> str:
    """decord adds a C++ stack to its message."""
    return (str(err).strip() or type(err).__name__).splitlines()[0][:200]
