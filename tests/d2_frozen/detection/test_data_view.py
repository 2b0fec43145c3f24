"""What is told of boxes before a training."""

from __future__ import annotations

import numpy as np
import pytest

from d2_frozen.detection.data_view import best_overlaps, shortened


def test_overlap_with_the_anchor_that_fits_best() -> None:
    """A square of the anchor's size is it; of half its side it is a quarter of it; a 2:1 box fits a 2:1 anchor."""
    sides = np.array([[32.0, 32.0], [16.0, 16.0], [64.0, 32.0], [32.0, 64.0], [0.0, 5.0]])  # width, height
    assert best_overlaps(sides, [32], [1.0]).tolist() == pytest.approx([1, 1 / 4, 1 / 2, 1 / 2, 0])
    # Height / width 0.5 of area 32 * 64: exactly the third.
    size = (32 * 64) ** 0.5
    wide = best_overlaps(sides, [size], [0.5])
    assert wide[2] == pytest.approx(1) and wide[3] == pytest.approx(32 * 32 / (2 * 32 * 64 - 32 * 32))
    assert best_overlaps(sides, [size, 32], [0.5, 1.0, 2.0])[:4].tolist() == pytest.approx([1, 1 / 4, 1, 1])


def test_long_tables_keep_their_ends() -> None:
    rows = [[f"class {k}", 100 - k] for k in range(100)]
    short = shortened(rows)
    assert short[:15] == rows[:15] and short[-15:] == rows[-15:] and short[15] == ["... 70 more", ""]
    assert shortened(rows[:30]) == rows[:30]
