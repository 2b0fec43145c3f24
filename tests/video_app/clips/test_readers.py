"""Frame k of a file carries k in its pixels and comes back as k, whatever reads it."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from video_app.clips.decoder import BadClip, ClipDecoder, VideoReading
from video_app.clips.reader import (
    ClipError,
    FewerFrames,
    ReaderMissing,
    installed_readers,
    open_clip,
    reader_order,
)
from video_app.clips.sampling import SamplingPlan

Numbers = Callable[[np.ndarray], list[int]]
WriteVideo = Callable[..., Path]


def starts(reader: str) -> bool:
    """torchcodec may be installed without the FFmpeg that it needs."""
    try:
        importlib.import_module(f"video_app.clips.reader_{reader}")
    except (ImportError, OSError, RuntimeError):
        return False
    return True


READERS = [name for name in installed_readers() if starts(name)]
each_reader = pytest.mark.parametrize("reader", READERS)


@each_reader
@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("b.mp4", "mpeg4"), ("a.webm", "libvpx")]
)
def test_frames_by_number(
    write_video: WriteVideo, numbers_of: Numbers, reader: str, name: str, codec: str
) -> None:
    """In any order, more than once, across key frames and B frames."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV does not encode {codec}")
    with open_clip(str(write_video(name, codec=codec)), reader) as clip:
        assert len(clip) == 40
        asked = [39, 0, 7, 20, 20, 13, 38]
        assert numbers_of(clip.read(asked)) == asked
        assert clip.read([3]).shape == (1, 120, 160, 3)
        assert clip.fps == pytest.approx(25, rel=0.01)


def test_readers_agree_to_the_bit(video: Path) -> None:
    pixels = []
    for reader in READERS:
        with open_clip(str(video), reader) as clip:
            pixels.append(clip.read([0, 11, 30], short_side_px=64))
    assert all(np.array_equal(pixels[0], other) for other in pixels[1:])
    assert pixels[0].shape == (3, 64, 85, 3)


@each_reader
def test_variable_frame_rate(write_video: WriteVideo, numbers_of: Numbers, reader: str) -> None:
    """20 frames of 40 ms, then 20 of 120 ms. By number all count alike; by time the slow ones count thrice."""
    path = write_video("a.mp4", shown_ms=lambda k: 40 * k if k < 20 else 800 + 120 * (k - 20))
    with open_clip(str(path), reader) as clip:
        assert clip.times_s[[0, 19, 20, 39]] == pytest.approx([0, 0.76, 0.8, 3.08], abs=2e-3)
        by_number = SamplingPlan("uniform", frames=4).indices(clip.times_s)[0]
        by_time = SamplingPlan("dense", frames=8, stride=1, fps=25, draws=(0.2,)).indices(clip.times_s)[0]
        assert by_number.tolist() == [5, 15, 25, 35]
        assert by_time.tolist() == numbers_of(clip.read(by_time))
        assert by_time.tolist() == [14, 15, 16, 17, 18, 19, 20, 20]


@each_reader
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(video: Path, tmp_path: Path, reader: str, degrees: int) -> None:
    """The picture is turned clockwise as the header asks: what was left ends up at the top for 90 degrees."""
    path = tmp_path / "turned.mp4"
    data = bytearray(video.read_bytes())
    matrix = data.index(b"tkhd") + 44
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    data[matrix : matrix + 36] = struct.pack(
        ">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30
    )
    path.write_bytes(data)
    with open_clip(str(video), reader) as clip:
        straight = clip.read([1])[0]
    with open_clip(str(path), reader) as clip:
        turned = clip.read([1])[0]
    assert np.array_equal(turned, np.rot90(straight, -degrees // 90))


@each_reader
def test_odd_sizes_and_single_frames(write_video: WriteVideo, numbers_of: Numbers, reader: str) -> None:
    with open_clip(str(write_video("odd.mkv", size=(91, 133), codec="ffv1")), reader) as clip:
        frames = clip.read([5, 6])
        assert frames.shape == (2, 91, 133, 3) and numbers_of(frames) == [5, 6]
    with open_clip(str(write_video("one.mp4", count=1)), reader) as clip:
        assert len(clip) == 1 and clip.fps == 0 and clip.duration_s == 0
        assert SamplingPlan("dense", 4, 2, clips=2).indices(clip.times_s).tolist() == [[0] * 4] * 2


def test_folder_of_pictures(tmp_path: Path) -> None:
    for k in range(12):
        cv2.imwrite(str(tmp_path / f"img_{k}.png"), np.full((20, 30, 3), (0, 0, 10 * k), np.uint8))
    with open_clip(str(tmp_path), "pyav", folder_fps=10) as clip:
        frames = clip.read([2, 10, 2], short_side_px=10)
        assert frames.shape == (3, 10, 15, 3)
        assert frames[:, 0, 0].tolist() == [
            [20, 0, 0],
            [100, 0, 0],
            [20, 0, 0],
        ]  # RGB; img_10 comes after img_9
        assert clip.duration_s == pytest.approx(1.2)


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    return path


@each_reader
def test_what_is_no_video(tmp_path: Path, video: Path, reader: str) -> None:
    empty, text, half = tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "half.mp4"
    empty.write_bytes(b"")
    text.write_text("not a video")
    half.write_bytes(video.read_bytes()[: video.stat().st_size // 2])  # its index stood at the end
    for path in (empty, text, half, write_audio(tmp_path / "sound.mp4"), tmp_path / "missing.mp4"):
        with pytest.raises(ClipError):
            open_clip(str(path), reader)
    (tmp_path / "no_pictures").mkdir()
    with pytest.raises(ClipError, match="no pictures"):
        open_clip(str(tmp_path / "no_pictures"), reader)


@each_reader
def test_a_cut_file_gives_the_frames_that_are_there(
    write_video: WriteVideo, tmp_path: Path, numbers_of: Numbers, reader: str
) -> None:
    """The header, at the start, still claims 40 frames; the clip is placed in those that decode."""
    whole = write_video("whole.mp4", faststart=True).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: len(whole) * 6 // 10])
    clip = ClipDecoder(VideoReading(reader, short_side_px=0)).read(
        str(path), SamplingPlan("uniform", frames=5)
    )
    assert 5 < clip.held < 40
    assert clip.indices.max() < clip.held
    assert numbers_of(clip.frames[0]) == clip.indices[0].tolist()


def test_a_container_that_claims_more_than_it_holds(
    write_video: WriteVideo, tmp_path: Path, numbers_of: Numbers
) -> None:
    """The last packets are there, and are noise: reading them says how many frames decode."""
    path = write_video("a.mkv", codec="mpeg4")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        places = [packet.pos for packet in file.demux(video=0) if packet.size]
    for pos in places[-3:]:
        start = data.index(b"\x00\x00\x01\xb6", pos)  # MPEG-4's start of a picture
        data[start : start + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with open_clip(str(path), "pyav") as clip:
        assert len(clip) == 40
        with pytest.raises(FewerFrames) as told:
            clip.read([0, 39])
        assert told.value.held == 37
        assert numbers_of(clip.read([36])) == [36]


@each_reader
def test_a_header_that_claims_more_time_than_there_is(
    write_video: WriteVideo, numbers_of: Numbers, reader: str
) -> None:
    """Frames are counted from what is in the file: twice the duration adds none."""
    path = write_video("a.mkv")
    data = bytearray(path.read_bytes())
    place = data.index(b"\x44\x89\x88") + 3  # Matroska's Duration, 8 bytes, milliseconds
    (duration_ms,) = struct.unpack(">d", data[place : place + 8])
    assert duration_ms == pytest.approx(1600, abs=50)
    data[place : place + 8] = struct.pack(">d", 2 * duration_ms)
    path.write_bytes(data)
    with av.open(str(path)) as file:
        assert file.duration == pytest.approx(3_200_000, abs=100_000)  # microseconds
    with open_clip(str(path), reader) as clip:
        assert len(clip) == 40 and numbers_of(clip.read([39])) == [39]


def test_choice_of_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("video_app.clips.reader.installed_readers", lambda: ["decord", "pyav"])
    assert reader_order("auto") == ["decord", "pyav"]
    assert reader_order("pyav") == ["pyav", "decord"]
    with pytest.raises(ValueError, match="torchcodec is not installed"):
        reader_order("torchcodec")
    with pytest.raises(ValueError, match="choose auto"):
        reader_order("opencv")
    monkeypatch.setattr("video_app.clips.reader.installed_readers", lambda: ["pyav"])
    assert reader_order("auto") == ["pyav"]
    with pytest.raises(ValueError, match="wheels for x86-64 Linux"):
        reader_order("decord")


def test_a_reader_that_does_not_start(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "video_app.clips.reader_torchcodec", None)
    with pytest.raises(ReaderMissing, match="torchcodec"):
        open_clip(str(video), "torchcodec")


def test_bad_files_name_what_every_reader_said(tmp_path: Path) -> None:
    path = tmp_path / "text.mp4"
    path.write_text("not a video")
    decoder = ClipDecoder(VideoReading("pyav"))
    with pytest.raises(BadClip, match="pyav: FFmpeg: Invalid data"):
        decoder.read(str(path), SamplingPlan())
    decoder.close()
