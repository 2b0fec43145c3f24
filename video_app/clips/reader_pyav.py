"""Video files by PyAV, whose wheels bring FFmpeg with them.

Opening reads the packets without decoding them: that gives the number of frames and their times without trust in the
header. Reading goes to the last key frame before a wanted frame and decodes from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import av
import numpy as np

from video_app.clips.reader import Clip, ClipError, FewerFrames, checked, resize_short_side, upright

av.logging.set_level(av.logging.PANIC)

# Titles and the like may be in any encoding. PyAV 19 does not ask any more.
_OPTIONS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class PyAVClip(Clip):
    """``pts`` are FFmpeg's presentation times, in units of the stream's time base."""

    reader = "pyav"

    def __init__(self, path: str):
        try:
            self._file = av.open(path, **_OPTIONS)
        except (av.FFmpegError, OSError) as err:
            raise ClipError(f"FFmpeg: {_short(err)}") from err
        if not self._file.streams.video:
            self._file.close()
            raise ClipError("no video stream in it")
        self._stream = self._file.streams.video[0]
        # Frame-parallel decoding would make the result of broken files depend on timing; workers are the parallelism.
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        self._index()

    def _index(self) -> None:
        pts: list[int] = []
        key_frames: list[tuple[int, int]] = []  # (pts, where to seek to)
        timed = True
        try:
            for packet in self._file.demux(self._stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                if packet.pts is None:
                    timed = False
                    pts.append(len(pts))
                else:
                    pts.append(packet.pts)
                    if packet.is_keyframe:
                        key_frames.append((packet.pts, packet.dts if packet.dts is not None else packet.pts))
        except (av.FFmpegError, OSError):
            pass  # the packets before the damage count
        # Without times (raw streams, some AVI), frames are numbered as they come out of the decoder.
        self._timed = timed and bool(pts)
        if not self._timed:
            pts = list(range(len(pts)))
        self._pts = np.unique(np.array(pts, np.int64))
        self._key_frames = sorted(key_frames) if self._timed else []
        if self._timed:
            seconds = float(self._stream.time_base or 1)
        else:
            rate = self._stream.average_rate or self._stream.guessed_rate
            seconds = 1 / float(rate) if rate else 1 / 30
        self.times_s = (self._pts - self._pts[:1]) * seconds

    def read(self, indices: Sequence[int], short_side_px: int = 0) -> np.ndarray:
        asked = checked(indices, len(self))
        try:
            found = self._decode(sorted(set(asked)), short_side_px)
        except (av.FFmpegError, OSError) as err:
            raise ClipError(f"FFmpeg: {_short(err)}") from err
        return np.stack([found[i] for i in asked])

    def _decode(self, wanted: list[int], short_side_px: int) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        frames: Iterator[tuple[int, av.VideoFrame]] | None = None
        at: int | None = None  # pts of the frame that came last
        sought: tuple[int, int] | None = None
        last_seen: int | None = None
        size: tuple[int, int] | None = None
        queue = list(wanted)
        while queue:
            target = int(self._pts[queue[0]])
            key_frame = self._key_frame_before(target)
            ahead = key_frame is not None and at is not None and key_frame[0] > at
            if frames is None or (ahead and key_frame != sought):
                frames, sought = self._frames_from(key_frame, target), key_frame
            item = next(frames, None)
            if item is None:
                # The last frame that decodes, by its time, tells how many the file holds.
                if last_seen is None:
                    last_seen = self._last_pts()
                held = (
                    int(np.searchsorted(self._pts, last_seen, side="right")) if last_seen is not None else 0
                )
                if held == 0 or held > queue[0]:
                    raise ClipError(f"frame {queue[0]} does not decode")
                raise FewerFrames(held, len(self))
            at, frame = item
            last_seen = at if last_seen is None else max(at, last_seen)
            if at < target:
                continue
            pixels = resize_short_side(self._pixels(frame), short_side_px)
            if size is None:
                size = pixels.shape[:2]
            while queue and int(self._pts[queue[0]]) <= at:
                # A damaged frame in the middle is replaced by the next one that decodes.
                found[queue.pop(0)] = pixels
            if pixels.shape[:2] != size:
                raise ClipError("the size of the picture changes")
        return found

    def _frames_from(
        self, key_frame: tuple[int, int] | None, target: int
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames with their pts, from the key frame on; from the start of the file where seeking fails."""
        # Containers differ in the clock by which they seek: presentation time, else decoding time.
        for position in key_frame if key_frame is not None and key_frame[0] > int(self._pts[0]) else ():
            frames = self._from_position(position)
            first = next(frames, None)
            if first is not None and first[0] <= target:
                yield first
                yield from frames
                return
        yield from self._from_position(None)

    def _from_position(self, position: int | None) -> Iterator[tuple[int, av.VideoFrame]]:
        start = int(self._stream.start_time or 0) if position is None else position
        try:
            self._file.seek(start, stream=self._stream, backward=True)
        except (av.FFmpegError, OSError):
            self._file.seek(0)
        self._stream.codec_context.flush_buffers()
        for count, frame in enumerate(self._decoded()):
            yield (frame.pts if self._timed and frame.pts is not None else count), frame

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Packets that do not decode are left out."""
        packets = self._file.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.FFmpegError, OSError):
                break
            try:
                yield from packet.decode()
            except (av.FFmpegError, OSError):
                continue

    def _last_pts(self) -> int | None:
        last = None
        for pts, _ in self._from_position(None):
            last = pts
        return last

    def _key_frame_before(self, target: int) -> tuple[int, int] | None:
        place = int(np.searchsorted([pts for pts, _ in self._key_frames], target, side="right")) - 1
        return self._key_frames[place] if place >= 0 else None

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        # FFmpeg counts counter-clockwise, from -180 to 180.
        self.rotation_deg = -int(round(frame.rotation / 90)) * 90 % 360
        return np.ascontiguousarray(upright(frame.to_ndarray(format="rgb24"), self.rotation_deg))

    def close(self) -> None:
        self._file.close()


def open_file(path: str) -> Clip:
    return PyAVClip(path)


def _short(err: Exception) -> str:
    return str(getattr(err, "strerror", None) or err)[:200]
