"""Video files by torchcodec, where FFmpeg is installed on the machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchcodec.decoders import VideoDecoder

from video_app.clips.reader import Clip, ClipError, FewerFrames, checked, resize_short_side
from video_app.clips.reader_pyav import PyAVClip

torch.set_num_threads(1)


class TorchCodecClip(Clip):
    """torchcodec does not tell the times of frames before it decodes them; PyAV reads them from the packets."""

    reader = "torchcodec"

    def __init__(self, path: str):
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
                raise ClipError(f"torchcodec: {_short(err)}") from err
            frames[index] = resize_short_side(picture, short_side_px)
        return np.stack([frames[i] for i in asked])

    def close(self) -> None:
        del self._video


def open_file(path: str) -> Clip:
    return TorchCodecClip(path)


def _short(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0][:200]
