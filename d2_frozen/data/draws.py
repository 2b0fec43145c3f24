"""The contract of the data path: every random choice is a function of (seed, position in the sample stream).

Not of the number of workers, of what a process did before, or of when a run was resumed. So batches are the
same bit for bit with 0, 1 or 4 workers, and after a resume; and any sample can be made again alone.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

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
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed: it would also seed the GPU, whose state a loader has no business with.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def draw_index(size: int, seed: int, *position: int) -> int:
    """An index in [0, size) that depends on (seed, position) only."""
    return int(_words(seed, *position)[3] % size)


def _words(seed: int, *position: int) -> np.ndarray:
    return np.random.SeedSequence([seed, *position]).generate_state(4)
