"""Video files by PyAV, whose wheels bring FFmpeg with them.

Opening reads the packets without decoding them: that gives the number of frames and their times without trust in the
header. Reading goes through the packets once more, and decodes from the last key frame before a wanted frame. It does
not seek: MPEG-PS and MPEG-TS land beside the key frame, and MPEG-PS then gives other times to the same packets.
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
    """``pts`` are FFmpeg's presentation times, in units of the stream's time base. Packets are numbered as they come.

    Attributes:
        container: FFmpeg's name of the format, by the file's content: "mov,mp4,m4a,3gp,3g2,mj2", "avi", "mpegts".
        open_gops: frames follow a key frame in the file and are shown before it, or one does not reset the decoder
            (H.264 in mp4, mkv and the like): they may need frames from before it.
    """

    reader = "pyav"

    def __init__(self, path: str):
        self._path = path
        self._open()
        self.container = self._file.format.name
        # Key frames to go back beyond the last one before a wanted frame (_decode).
        self._back = 0
        self._index()

    def _open(self) -> None:
        try:
            self._file = av.open(self._path, **_OPTIONS)
        except (av.FFmpegError, OSError) as err:
            raise ClipError(f"FFmpeg: {_short(err)}") from err
        if not self._file.streams.video:
            self._file.close()
            raise ClipError("no video stream in it")
        self._stream = self._file.streams.video[0]
        # Frame-parallel decoding would make the result of broken files depend on timing; workers are the parallelism.
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1

    def _index(self) -> None:
        pts: list[int] = []
        key_frames: list[tuple[int, int]] = []  # (pts, number of the packet)
        self.open_gops = False
        # AVI has no times; what FFmpeg makes up for H.264 with B-frames is in the order of the file.
        timed = not (self.container == "avi" and self._stream.codec_context.has_b_frames)
        for number, packet in self._packets():
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None:
                timed = False
                pts.append(len(pts))
                continue
            pts.append(packet.pts)
            if packet.is_keyframe:
                self.open_gops |= bool(key_frames) and self._is_plain_picture(packet)
                key_frames.append((packet.pts, number))
            elif key_frames and packet.pts < key_frames[-1][0]:
                self.open_gops = True
        # MPEG-PS gives a time to some frames only; between them FFmpeg counts, and may come to the same time twice.
        if self.container == "mpeg" and len(set(pts)) < len(pts):
            timed = False
        # Without times (also raw streams, some AVI), frames are numbered as they come out of the decoder.
        self._timed = timed and bool(pts)
        if not self._timed:
            pts = list(range(len(pts)))
        self._pts = np.unique(np.array(pts, np.int64))
        keys = sorted(key_frames) if self._timed else []
        self._key_frames = np.array(keys, np.int64).reshape(-1, 2)
        if self._timed:
            seconds = float(self._stream.time_base or 1)
        else:
            rate = self._stream.average_rate or self._stream.guessed_rate
            seconds = 1 / float(rate) if rate else 1 / 30
        self.times_s = (self._pts - self._pts[:1]) * seconds

    def _is_plain_picture(self, packet: av.Packet) -> bool:
        """Of H.264, and no IDR picture, where the header says how the packet is divided (avcC, ISO 14496-15)."""
        codec = self._stream.codec_context
        header = codec.extradata or b""
        if codec.codec.canonical_name != "h264" or len(header) < 5 or header[0] != 1:
            return False
        bytes_of_length = (header[4] & 3) + 1
        data, place = bytes(packet), 0
        while place + bytes_of_length < len(data):
            unit = place + bytes_of_length
            if data[unit] & 31 == 5:
                return False
            place = unit + int.from_bytes(data[place:unit], "big")
        return True

    def read(self, indices: Sequence[int], short_side_px: int = 0) -> np.ndarray:
        asked = checked(indices, len(self))
        try:
            found = self._decode(sorted(set(asked)), short_side_px)
        except (av.FFmpegError, OSError) as err:
            raise ClipError(f"FFmpeg: {_short(err)}") from err
        return np.stack([found[i] for i in asked])

    def _decode(self, wanted: list[int], short_side_px: int) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        frames: Iterator[tuple[int, int, av.VideoFrame]] | None = None
        packets = self._packets_again()
        begun = fed = 0  # numbers of packets: where ``frames`` began, and the last one in the decoder
        last_seen: int | None = None  # pts
        size: tuple[int, int] | None = None
        queue = list(wanted)
        while queue:
            target = int(self._pts[queue[0]])
            first = self._first_packet(target)
            if frames is None or first > fed:
                frames, begun, last_seen = self._frames(packets, first), first, None
            item = next(frames, None)
            if begun > 0 and self._back == 0 and (item is None or item[1] > target):
                # The frame did not come. Some key frames do not do alone (a picture that is renewed in parts, flags
                # that are wrong): from here on, the one before is taken. Once per file, as in damaged ones
                # nothing helps.
                self._back = 1
                frames, packets = None, self._packets_again()
                continue
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
            fed, at, frame = item
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

    def _first_packet(self, target: int) -> int:
        """Number of the packet to decode from, to come to the pts ``target``."""
        place = int(np.searchsorted(self._key_frames[:, 0], target, side="right")) - 1 - self._back
        return int(self._key_frames[place, 1]) if place >= 0 else 0

    def _packets(self) -> Iterator[tuple[int, av.Packet]]:
        """With their numbers; those before the damage where the container is broken."""
        try:
            yield from enumerate(self._file.demux(self._stream))
        except (av.FFmpegError, OSError):
            return

    def _packets_again(self) -> Iterator[tuple[int, av.Packet]]:
        """From the start, in a file opened anew: in MPEG-TS, a seek to the start lands behind the first key frame."""
        self._file.close()
        self._open()
        return self._packets()

    def _frames(
        self, packets: Iterator[tuple[int, av.Packet]], first: int
    ) -> Iterator[tuple[int, int, av.VideoFrame]]:
        """(number of the packet that went in last, pts, frame), decoded from packet ``first`` on."""
        self._stream.codec_context.flush_buffers()
        count = 0
        for number, packet in packets:
            if number < first:
                continue
            try:
                decoded = packet.decode()
            except (av.FFmpegError, OSError):
                continue  # packets that do not decode are left out
            for frame in decoded:
                yield number, frame.pts if self._timed and frame.pts is not None else count, frame
                count += 1

    def _last_pts(self) -> int | None:
        last = None
        for _, pts, _ in self._frames(self._packets_again(), 0):
            last = pts
        return last

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
