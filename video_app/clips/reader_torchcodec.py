"""Video files by torchcodec, where FFmpeg is installed on the machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchcodec.decoders import VideoDecoder

from video_app.clips.reader import Clip, ClipError, FewerFrames, checked, resize_short_side
from video_app.clips.reader_pyav import PyAVClip

torch.set_num_threads(1)
try:
    VideoDecoder(b"")
except (
    Exception
) as err:  # of course it is no video; but from here on FFmpeg is loaded, or is known to be missing
    if "Could not load libtorchcodec" in str(err):
        raise ImportError(str(err)) from err


class TorchCodecClip(Clip):
    """torchcodec does not tell the times of frames before it decodes them; PyAV reads them from the packets."""

    reader = "torchcodec"

    def __init__(self, path: str):
        self._path = path
        with PyAVClip(path) as packets:
            self.times_s = packets.times_s
        try:
            # "exact" reads all packets too: a header may claim more frames than there are.
            self._video = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        except (RuntimeError, ValueError, IndexError) as err:
            raise ClipError(f"torchcodec: {_short(err)}") from err

    def read(self, indices: Sequence[int], short_side_px: int = 0) -> np.ndarray:
        asked = checked(indices, len(self))
        held = len(self._video)
        if max(asked) >= held:
            raise FewerFrames(held, len(self)) if held else ClipError("no frame decodes")
        frames: dict[int, np.ndarray] = {}
        for index in sorted(set(asked)):
            try:
                picture = self._video.get_frame_at(index).data.numpy()
            except (RuntimeError, IndexError) as err:
                held = self._held_of_a_cut_file(index)
                raise (
                    FewerFrames(held, len(self)) if held else ClipError(f"torchcodec: {_short(err)}")
                ) from err
            frames[index] = resize_short_side(picture, short_side_px)
        return np.stack([frames[i] for i in asked])

    def _held_of_a_cut_file(self, failed: int) -> int:
        """How many frames decode; 0 where the file does not end early. It is PyAV that tells a cut file."""
        with PyAVClip(self._path) as packets:
            try:
                packets.read([len(packets) - 1])
                return 0
            except FewerFrames as fewer:
                # Fewer than for PyAV: the frames in front of a broken packet do not come out either.
                held = min(fewer.held, failed)
        while held and not self._decodes(held - 1):
            held -= 1
        return held

    def _decodes(self, index: int) -> bool:
        try:
            self._video.get_frame_at(index)
        except (RuntimeError, IndexError):
            return False
        return True

    def close(self) -> None:
        del self._video


def open_file(path: str) -> Clip:
    return TorchCodecClip(path)


def _short(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0][:200]
