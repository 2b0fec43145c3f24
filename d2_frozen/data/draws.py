"""The contract of the data path: every random choice is a function of (seed, position in the sample stream).

Not of the number of workers, of what a process did before, or of when a run was resumed. So batches are the
same bit for bit with 0, 1 or 4 workers, and after a resume; and any sample can be made again alone.

With a fixed number of views per image (MODEL.FROZEN.CACHE.VIEWS) the position chooses the view, and how the image is
augmented is a function of (seed of the views, image, view).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int, *position: int) -> Iterator[None]:
    """Within, the global generators of random, numpy and torch (CPU) draw from (seed, position).

    Args:
        seed, position: integers >= 0.
    Afterwards the generators are as they were before.
    """
    words = _words(seed, *position)
    restore = remember_generators()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed: it would also seed the GPU, whose state a loader has no business with.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def start_values(seed: int) -> Iterator[None]:
    """Within, the generators (as above) draw as right after Detectron2's ``seed_all_rng(seed)``: for building a model.

    Afterwards they are as they were: whoever builds a model in a larger program does not find its own draws repeated.
    """
    restore = remember_generators()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        restore()


def remember_generators() -> Callable[[], None]:
    """A function that puts the global generators of random, numpy and torch (CPU) back to where they are now."""
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)

    return restore


def image_number(record: Mapping[str, Any]) -> int:
    """What a record is known by in draws: a number from its image (or video) id, else from its file's name.

    Not its index: it must stay the same when others are added or left out.
    """
    name = record.get("image_id", record.get("video_id"))
    name = os.path.basename(record.get("file_name", "")) if name is None else name
    return int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:8], "little")


def draw_index(size: int, seed: int, *position: int) -> int:
    """An index in [0, size) that depends on (seed, position) only."""
    return int(_words(seed, *position)[3] % size)


def _words(seed: int, *position: int) -> np.ndarray:
    return np.random.SeedSequence([seed, *position]).generate_state(4)
