"""The generated clips of the video quickstart: classes that no single frame tells.

    python -m video_app.moving_shapes --output datasets/moving_shapes --train 300 --val 100 --seed 0

Out, under DIR: train.txt and val.txt ("train/000000.mp4 3" lines), classes.txt, {train,val}/*.mp4, manifest.json.
What is drawn stands in ``moving_shapes_render.py``. A video depends on (seed, split, number, size, frames) only, and on
the version of the encoder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

from d2_frozen.claims import CLAIM_FILE, claimed, holds_files
from d2_frozen.files import whole_file, write_text
from video_app.moving_shapes_render import CLASSES, render

# A change of what is drawn or encoded makes older folders count as different.
GENERATOR = "video_app.moving_shapes 3"
FPS = 16
_MANIFEST = "manifest.json"


def generate(
    output: str | Path, train: int = 300, val: int = 100, seed: int = 0, size_px: int = 112, frames: int = 48
) -> bool:
    """Write the clips to ``output``, unless the same ones are complete there. Whole again after an interruption.

    Args:
        train, val: numbers of videos; classes take turns, so multiples of 10 are balanced.
        size_px: side of the square picture, at least 32 and even.
        frames: of each video, at least 16; 16 per second.
    Returns:
        True if it wrote, False if nothing was to do.
    Raises:
        ValueError: a number out of range.
        FileExistsError: ``output`` holds something else.
    """
    if min(train, val) < 0 or train + val < 1 or size_px < 32 or size_px % 2 or frames < 16 or seed < 0:
        raise ValueError(
            f"train={train}, val={val}, seed={seed}, size={size_px}, frames={frames}: counts and seed are 0 or more "
            "with one video at least, the size is even and 32 px or more, and a video has 16 frames or more."
        )
    root = Path(output)
    recipe = {
        "generator": GENERATOR,
        "codec": f"{_codec()}, PyAV {av.__version__}",
        **{"train": train, "val": val, "seed": seed, "size_px": size_px, "frames": frames},
    }
    if _is_made(root, recipe):
        return False
    root.mkdir(parents=True, exist_ok=True)
    with claimed(root / CLAIM_FILE, wait=True):
        if _is_made(root, recipe):  # by another process meanwhile
            return False
        write_text(root / _MANIFEST, json.dumps({"recipe": recipe, "bytes": None}))
        write_text(root / "classes.txt", "".join(f"{name}\n" for name in CLASSES))
        sizes: dict[str, int] = {}
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            (root / split).mkdir(exist_ok=True)
            lines = []
            for index in range(count):
                label, name = index % len(CLASSES), f"{split}/{index:06d}.mp4"
                random = np.random.default_rng([seed, number, index])
                encode(root / name, render(label, random, size_px, frames))
                sizes[name] = (root / name).stat().st_size
                lines.append(f"{name} {label}\n")
            for leftover in sorted((root / split).glob("*.mp4*")):
                if f"{split}/{leftover.name}" not in sizes:
                    leftover.unlink()
            write_text(root / f"{split}.txt", "".join(lines))
        write_text(root / _MANIFEST, json.dumps({"recipe": recipe, "bytes": sizes}, indent=1))
    return True


def _is_made(root: Path, recipe: dict[str, object]) -> bool:
    """Is it there? Refuses a folder that holds other people's files."""
    manifest = _manifest_in(root)
    if manifest is not None:
        return manifest["recipe"] == recipe and _is_whole(root, manifest)
    if root.is_dir() and holds_files(root):
        raise FileExistsError(f"{root} holds something that {GENERATOR} did not write; name an empty folder.")
    return False


def encode(path: Path, pictures: Sequence[np.ndarray], fps: int = FPS) -> None:
    """(H, W, 3) uint8 RGB pictures -> an mp4 file, equal bytes each time."""
    height, width = pictures[0].shape[:2]
    with whole_file(path, durable=False) as partial, av.open(str(partial), "w", format="mp4") as file:
        stream = file.add_stream(_codec(), rate=fps)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Several threads would cut the picture into slices, and the bytes would depend on the machine.
        stream.codec_context.thread_count = 1
        if _codec() == "libx264":
            # With "veryfast", 11 of 25 sets of 20 clips had other bytes when made again; with this, none.
            stream.options = {"crf": "20", "preset": "ultrafast"}
        else:
            stream.codec_context.bit_rate = 160_000
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _codec() -> str:
    """h264 as in Kinetics; builds of FFmpeg without x264 have MPEG-4 at least."""
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def _manifest_in(root: Path) -> dict | None:
    try:
        manifest = json.loads((root / _MANIFEST).read_text(encoding="utf-8"))
        ours = manifest["recipe"]["generator"].startswith("video_app.moving_shapes")
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return manifest if ours else None


def _is_whole(root: Path, manifest: dict) -> bool:
    sizes = manifest["bytes"]
    return sizes is not None and all(
        (root / name).is_file() and (root / name).stat().st_size == size for name, size in sizes.items()
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m video_app.moving_shapes",
        description="Generate clips whose classes no single frame tells.",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=300, help="training videos (default: 300)")
    parser.add_argument("--val", type=int, default=100, help="held-out videos (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=112, help="side in pixels (default: 112)")
    parser.add_argument(
        "--frames", type=int, default=48, help="frames of a video, 16 per second (default: 48)"
    )
    args = parser.parse_args(arguments)
    try:
        wrote = generate(args.output, args.train, args.val, args.seed, args.size, args.frames)
    except (ValueError, FileExistsError) as err:
        parser.error(str(err))
    state = "written to" if wrote else "already complete in"
    print(f"{args.train} training and {args.val} held-out videos {state} {args.output}")


if __name__ == "__main__":
    main()
