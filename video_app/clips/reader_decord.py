"""Video files by decord (x86-64 Linux wheels). It turns frames upright itself."""

from __future__ import annotations

from collections.abc import Sequence

import decord
import numpy as np

from video_app.clips.reader import Clip, ClipError, checked, resize_short_side

decord.logging.set_level(decord.logging.QUIET)
# Frames of full size that are held at a time: 16 of 1080p are 100 MB.
_CHUNK_BYTES = 64 << 20


class DecordClip(Clip):
    reader = "decord"

    def __init__(self, path: str):
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


def _short(err: Exception) -> str:
    """decord adds a C++ stack to its message."""
    return (str(err).strip() or type(err).__name__).splitlines()[0][:200]
