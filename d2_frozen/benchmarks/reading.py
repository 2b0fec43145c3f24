"""What does reading for the crop alone save, and how do pixels change? Per training image, by size of the photo.

    python -m d2_frozen.bench reading [--size 1024] [--draws 24] [--json FILE]

``whole`` is Detectron2's way: the image is decoded and resized, then cropped. ``window`` is what training does
(d2_frozen/data/reading.py): the same pixels, bit for bit, which is checked. ``fast`` is INPUT.FAST_READING.
Photos are generated: smooth colours with noise on top, as JPEGs of quality 90. CPU time, one thread; all ways get the
same drawn ``scale_crop`` augmentations of the default scales, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate

from d2_frozen.benchmarks.measuring import machine_facts, write_json
from d2_frozen.data.draws import seeded
from d2_frozen.data.reading import channels_first, read_augmented
from d2_frozen.data.transforms import SquareCrop
from detectron2.data import detection_utils
from detectron2.data import transforms as T

_SIZES_HW = ((480, 640), (3000, 4000))


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what is also written with ``--json``."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench reading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=int, default=1024, help="side of the crop in pixels")
    parser.add_argument("--draws", type=int, default=24, help="augmentations of each photo")
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args(arguments)
    rows = [compare(hw, args.size, args.draws) for hw in _SIZES_HW]
    result = {"machine": machine_facts(), "size": args.size, "draws": args.draws, "photos": rows}
    print("  ".join(f"{key}: {value}" for key, value in result["machine"].items()) + "\n")
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    write_json(result, args.json)
    return result


def compare(image_hw: tuple[int, int], size: int, draws: int) -> dict[str, Any]:
    """Mean CPU milliseconds of each way over the draws, and the mean absolute difference of pixels (of 255).

    Raises:
        RuntimeError: the window alone has other pixels than the whole image.
    """
    height, width = image_hw
    augmentations = T.AugmentationList(
        [T.ResizeScale(0.1, 2.0, size, size), SquareCrop(size), T.RandomFlip()]
    )
    seconds: dict[str, list[float]] = {"whole": [], "window": [], "fast": []}
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "photo.jpg")
        Image.fromarray(_photo(height, width)).save(path, quality=90)
        for draw in range(draws):
            start = time.process_time()
            with seeded(0, draw):
                inputs = T.AugInput(detection_utils.read_image(path, format="RGB"))
                transforms = augmentations(inputs)
            whole = np.ascontiguousarray(inputs.image.transpose(2, 0, 1))
            seconds["whole"].append(time.process_time() - start)
            made = {}
            for way in ("window", "fast"):
                start = time.process_time()
                pixels = read_augmented(path, "RGB", image_hw, transforms, fast=way == "fast")
                assert pixels is not None
                made[way] = channels_first(pixels)
                seconds[way].append(time.process_time() - start)
            if not np.array_equal(made["window"], whole):
                raise RuntimeError(
                    f"{width}x{height}, draw {draw}: pixels differ from those of the whole image."
                )
            differences.append(float(np.abs(made["fast"].astype(int) - whole.astype(int)).mean()))
    means = {way: statistics.mean(values) for way, values in seconds.items()}
    return {
        "photo": f"{width}x{height}",
        **{f"{way}, ms": 1000 * value for way, value in means.items()},
        "window / whole": means["window"] / means["whole"],
        "fast / whole": means["fast"] / means["whole"],
        "fast: mean difference, of 255": statistics.mean(differences),
        "largest mean of a draw": max(differences),
    }


def _photo(height: int, width: int) -> np.ndarray:
    random = np.random.RandomState(0)
    small = random.randint(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return (smooth.astype(int) + random.randint(-6, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
