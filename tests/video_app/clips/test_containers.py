"""``read`` gives the frames of a decode from the start, in every container, or the reader refuses the file."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from video_app.clips.decoder import ClipDecoder, VideoReading
from video_app.clips.reader import ClipError, installed_readers, open_clip, order_for_file, reader_order
from video_app.clips.sampling import SamplingPlan
from video_app.data.lists import VIDEOS

COUNT = 47  # three whole groups of pictures and a part
SPREAD = [0, 1, 8, 13, 24, 25, 35, 36, 37, 46]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A file name with what is written into it; ``b_frames`` in a row are stored out of order."""

    name: str
    codec: str
    b_frames: int = 0
    options: str = ""

    def __str__(self) -> str:
        return f"{self.codec}_{self.name}"


OPEN_GOPS = (
    Kind("open.mp4", "libx264", 3, "open-gop=1"),
    Kind("renewed.mkv", "libx264", 0, "intra-refresh=1"),
)
KINDS = (
    *(Kind(f"a{suffix}", "libx264", 2) for suffix in (".mp4", ".m4v", ".mov", ".mkv", ".3gp", ".flv")),
    *(Kind(f"a{suffix}", "libx264", 2) for suffix in (".ts", ".mts", ".m2ts", ".avi")),
    *(Kind(f"a{suffix}", "mpeg2video", 2) for suffix in (".mpg", ".mpeg", ".ts", ".m2ts", ".mkv")),
    *(Kind("one.mpg", "mpeg1video", b_frames) for b_frames in (0, 2)),
    *(Kind(f"four{suffix}", "mpeg4", 2) for suffix in (".avi", ".mp4", ".mkv", ".ts")),
    *(Kind(name, "mpeg4") for name in ("simple.avi", "simple.mp4")),
    *(Kind("a.wmv", "wmv2"), Kind("old.flv", "flv"), Kind("a.gif", "gif"), Kind("a.ogv", "libvpx")),
    *(Kind("a.webm", "libvpx-vp9"), Kind("nine.mkv", "libvpx-vp9")),
    *(
        *OPEN_GOPS,
        Kind("open.ts", "libx264", 3, "open-gop=1"),
        Kind("renewed.ts", "libx264", 0, "intra-refresh=1"),
    ),
)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
needs_decord = pytest.mark.skipif("decord" not in installed_readers(), reason="decord is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("containers")


def write(folder: Path, kind: Kind) -> Path:
    """A blurred random picture that moves to the right by 2 pixels per frame, a key frame every 12; written once."""
    path = folder / f"{kind.codec}_{kind.b_frames}_{kind.name}"
    if path.exists():
        return path
    try:
        av.Codec(kind.codec, "w")
    except ValueError:
        pytest.skip(f"this PyAV does not encode {kind.codec}")
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    picture = cv2.normalize(cv2.GaussianBlur(picture, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    options = {"x264-params": kind.options} if kind.options else {}
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(kind.codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if kind.codec == "gif" else "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 12, 1
        stream.codec_context.max_b_frames = kind.b_frames
        for k in range(COUNT):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * k, axis=1), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def decoded_from_start(path: Path) -> np.ndarray:
    """(COUNT, H, W, 3), no two alike; a decoder puts frames in the order in which they are shown."""
    with av.open(str(path)) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert len(frames) == COUNT and all((a != b).any() for a, b in zip(frames, frames[1:]))
    return frames


def check(path: Path, reader: str) -> None:
    """Frames one by one, backwards; spread over the file; all."""
    right = decoded_from_start(path)
    with open_clip(str(path), reader) as clip:
        assert len(clip) == COUNT and clip.fps == pytest.approx(25, rel=0.01)
        for k in range(COUNT - 1, -1, -1):
            assert np.array_equal(clip.read([k])[0], right[k]), k
        assert np.array_equal(clip.read(SPREAD), right[SPREAD])
        assert np.array_equal(clip.read(range(COUNT)), right)


@each_kind
def test_pyav_gives_the_frames_of_a_decode_from_the_start(folder: Path, kind: Kind) -> None:
    check(write(folder, kind), "pyav")


@each_kind
def test_auto_begins_with_a_reader_that_is_right_or_says_that_it_is_not(folder: Path, kind: Kind) -> None:
    path = write(folder, kind)
    readers = order_for_file(reader_order("auto"), str(path))
    try:
        open_clip(str(path), readers[0]).close()
    except ClipError as err:
        assert readers[0] == "decord" and "use the reader pyav" in str(err)
        readers = readers[1:]
    check(path, readers[0])


@needs_decord
@each_kind
def test_decord_agrees_or_refuses(folder: Path, kind: Kind) -> None:
    path = write(folder, kind)
    closed = kind.codec in ("libx264", "libvpx-vp9") or kind.b_frames == 0
    if path.suffix in (".mp4", ".m4v", ".mov", ".mkv", ".3gp", ".webm") and closed and kind not in OPEN_GOPS:
        check(path, "decord")
    else:
        with pytest.raises(ClipError, match="use the reader pyav"):
            open_clip(str(path), "decord")


@needs_decord
@pytest.mark.parametrize("kind", [Kind("four.avi", "mpeg4", 2), Kind("a.mpg", "mpeg2video", 2)], ids=str)
def test_decord_alone_refuses_times_that_it_does_not_know(
    folder: Path, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without PyAV, and with a name that says nothing: 1e14 s, or all frames at once."""
    path = tmp_path / "clip"
    path.write_bytes(write(folder, kind).read_bytes())
    with pytest.raises(ClipError, match="this container"):
        open_clip(str(path), "decord")
    module = importlib.import_module("video_app.clips.reader_decord")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClipError, match="does not tell when the frames are shown; use the reader pyav"):
        open_clip(str(path), "decord")


def test_decord_is_first_only_where_it_is_right() -> None:
    """Whatever ends else, or has no ending, is PyAV's; where that is not installed, nothing changes."""
    both = ["decord", "pyav"]
    firsts = {suffix for suffix in VIDEOS if order_for_file(both, f"a{suffix}")[0] == "decord"}
    assert firsts == {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".3gp"}
    assert order_for_file(both, "A.MP4") == both and order_for_file(both, "mp4/clip") == both[::-1]
    for alone in (["decord"], ["pyav"], ["decord", "torchcodec"], ["pyav", "torchcodec"]):
        assert order_for_file(alone, "a.avi") == alone


@needs_decord
def test_pyav_steps_in_where_decord_refuses(folder: Path) -> None:
    avi = write(folder, Kind("four.avi", "mpeg4", 2))
    right, plan = decoded_from_start(avi), SamplingPlan("uniform", frames=8)
    for choice, told in (("auto", ""), ("decord", "decord: decord may scramble the frames of .avi files")):
        decoder = ClipDecoder(VideoReading(choice, short_side_px=0))
        clip = decoder.read(str(avi), plan)
        decoder.close()
        assert clip.reader == "pyav" and clip.fault.startswith(told) and bool(clip.fault) == bool(told)
        assert clip.fps == pytest.approx(25) and np.array_equal(clip.frames[0], right[clip.indices[0]])


@needs_decord
def test_what_auto_passes_on_is_no_fault(folder: Path) -> None:
    """A warning for each read would bury all else, where a phone writes open GOPs."""
    path = write(folder, OPEN_GOPS[0])
    for choice, told in (("auto", ""), ("decord", "decord: decord scrambles frames where GOPs are open")):
        decoder = ClipDecoder(VideoReading(choice, short_side_px=0))
        clip = decoder.read(str(path), SamplingPlan("uniform", frames=8))
        decoder.close()
        assert clip.reader == "pyav" and clip.fault.startswith(told) and bool(clip.fault) == bool(told)


def counted_openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file is opened again for each pass through it."""
    module = importlib.import_module("video_app.clips.reader_pyav")
    opened: list[str] = []
    open_it = module.PyAVClip._open

    def counting(clip: Any) -> None:
        opened.append(clip._path)
        open_it(clip)

    monkeypatch.setattr(module.PyAVClip, "_open", counting)
    return opened


def test_a_key_frame_that_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container claims that one can begin at packet 15, of a P-frame: nothing comes from there until frame 24."""
    path = write(folder, Kind("p.mp4", "libx264"))
    right = decoded_from_start(path)
    opened = counted_openings(monkeypatch)
    with open_clip(str(path), "pyav") as clip:
        keys = clip._key_frames  # type: ignore[attr-defined]
        clip._key_frames = np.insert(keys, 2, (clip._pts[15], 15), axis=0)  # type: ignore[attr-defined]
        assert np.array_equal(clip.read([16, 20, 46]), right[[16, 20, 46]])
        assert len(opened) == 3


def test_damaged_frames_cost_one_more_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six packets are noise: the next frame that decodes stands for each, found without a pass per frame."""
    path = write(folder, Kind("damaged.mkv", "mpeg4"))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        places = [packet.pos for packet in file.demux(video=0) if packet.size]
    damaged = [10, 11, 22, 23, 34, 35]  # the last of each group, so that the others stay whole
    for k in damaged:
        start = data.index(b"\x00\x00\x01\xb6", places[k])  # MPEG-4's start of a picture
        data[start : start + 4] = b"\xff\xff\xff\xff"
    right = decoded_from_start(path)
    path.write_bytes(data)
    opened = counted_openings(monkeypatch)
    with open_clip(str(path), "pyav") as clip:
        got = clip.read([9, *damaged, 46])
        assert np.array_equal(got, right[[9, 12, 12, 24, 24, 36, 36, 46]])
        assert len(opened) <= 3
