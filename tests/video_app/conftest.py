"""Videos whose frames say which frame they are."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from tiny_runs import VIDEO, trained_on, video_entries, write_config

from video_app.moving_shapes import generate

BITS = 6


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """Six upright bars, white where the number's bit is set."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            frame[:, bit * width // BITS : (bit + 1) * width // BITS] = 255
    return frame


def number_in(frame: np.ndarray) -> int:
    height, width = frame.shape[:2]
    middles = [frame[height // 2, (2 * bit + 1) * width // (2 * BITS)].mean() for bit in range(BITS)]
    return sum(1 << bit for bit, value in enumerate(middles) if value > 128)


def write_numbered(
    path: Path,
    count: int = 40,
    size: tuple[int, int] = (120, 160),
    codec: str = "libx264",
    shown_ms: Callable[[int], int] = lambda k: 40 * k,
    faststart: bool = False,
) -> Path:
    """A key frame every 12, so that reading has to seek; x264 adds frames that are stored out of order."""
    height, width = size
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 12
        stream.codec_context.thread_count = 1
        if codec != "mpeg4":
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(k, height, width), format="rgb24")
            frame.pts, frame.time_base = shown_ms(k), Fraction(1, 1000)
            if codec == "mpeg4":
                frame.pts, frame.time_base = k, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 numbered frames at 25 per second, 160 x 120, h264."""
    return write_numbered(tmp_path_factory.mktemp("video") / "forty.mp4")


@pytest.fixture
def write_video(tmp_path: Path) -> Callable[..., Path]:
    """``write_video("a.mp4", count=3)`` -> path."""
    return lambda name, **options: write_numbered(tmp_path / name, **options)


@pytest.fixture
def numbers_of() -> Callable[[np.ndarray], list[int]]:
    """Frame numbers that the pixels of (T, H, W, 3) say."""
    return lambda frames: [number_in(frame) for frame in frames]


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training and 10 held-out generated clips of 48 px."""
    folder = tmp_path_factory.mktemp("moving") / "clips"
    generate(folder, train=20, val=10, seed=3, size_px=48, frames=16)
    return folder


@pytest.fixture
def tiny_config(tiny_clips: Path, tmp_path: Path) -> Path:
    """A yaml over the base: small everything, dropout on, seed 7, 4 iterations, output in tmp_path/out."""
    return write_config(
        tmp_path / "tiny.yaml",
        VIDEO,
        trained_on(video_entries(tiny_clips), iterations=4),
        {
            "MODEL": {"VIDEO_HEAD": {"DROPOUT": 0.1, "DROP_PATH": 0.2}},
            "VIDEO": {"NUM_FRAMES": 3, "TEST": {"CLIPS": 2, "CROPS": 1}},
            "SOLVER": {"BASE_LR": 0.01},
            "TEST": {"PICTURES": 2},
            "OUTPUT_DIR": f"{tmp_path}/out",
        },
    )
