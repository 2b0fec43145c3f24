"""Text in pictures: letters of any alphabet that the font has, at the place that was asked for, and nowhere else."""

import numpy as np
import pytest

from d2_frozen.lettering import put_text, text_width


def written(text: str, place: tuple[int, int] = (10, 30), size: int = 20) -> np.ndarray:
    picture = np.full((40, 120, 3), 255, np.uint8)
    put_text(picture, text, place, size, (0, 0, 0))
    return picture


def test_letters_stand_on_the_line_from_the_left_end_on():
    rows, columns = np.nonzero((written("HE") < 128).all(-1))
    assert rows.max() == 29 and rows.min() in (14, 15, 16)  # capitals have three quarters of the size
    assert columns.min() in (10, 11, 12, 13) and columns.max() <= 10 + text_width("HE", 20)


@pytest.mark.parametrize("letter", "éßłøžñışдσ")
def test_letters_beyond_ascii_are_drawn(letter):
    """Not as the box of a letter that the font has not, nor as the question mark of OpenCV's."""
    drawn = written(letter)
    assert (drawn < 128).any()
    for other in ("\U0001f9ff", "?", "??"):
        assert not np.array_equal(drawn, written(other))


def test_what_lies_outside_is_left_out():
    assert (written("text", place=(200, 30)) == 255).all() and (written("", place=(10, 30)) == 255).all()
    cut = written("HHHH", place=(-8, 8))
    assert (cut < 128).any() and (cut[12:] == 255).all()
