"""What is an id, what is none; ids of the data against ids of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2_frozen.data.label_maps import LabelMapError, read_label_map


@pytest.mark.parametrize("numbers", [np.uint8([[0, 7], [255, 1]]), np.uint16([[0, 300], [65535, 1]])])
def test_8_and_16_bits_are_read_as_they_are(numbers: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(numbers).save(tmp_path / "a.png")
    assert (read_label_map(str(tmp_path / "a.png")) == numbers).all()


def test_a_palette_is_looked_through(tmp_path: Path) -> None:
    image = Image.fromarray(np.uint8([[0, 2], [1, 1]]), mode="P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.png")
    assert read_label_map(str(tmp_path / "a.png")).tolist() == [[0, 2], [1, 1]]


def test_colours_are_refused_with_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (128, 64, 128)).save(tmp_path / "road.png")
    with pytest.raises(LabelMapError, match=r"colours instead of class ids.*road.png is RGB"):
        read_label_map(str(tmp_path / "road.png"))


def test_label_values_become_classes_and_the_rest_is_ignored(tmp_path: Path) -> None:
    """As for Cityscapes' labelIds, where 7 is road and 8 sidewalk."""
    Image.fromarray(np.uint8([[7, 8], [0, 33]])).save(tmp_path / "a.png")
    assert read_label_map(str(tmp_path / "a.png"), [7, 8], 255).tolist() == [[0, 1], [255, 255]]


def test_white_of_one_bit_is_the_white_that_label_values_names(tmp_path: Path) -> None:
    """A PNG of one bit has 1 where a viewer shows white, as one of 8 bits does for 255."""
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    assert read_label_map(path, [0, 255]).tolist() == [[0, 1]]
    assert read_label_map(path, [1, 0]).tolist() == [[1, 0]]
    assert read_label_map(path).tolist() == [[0, 1]]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """PIL's own message, "image file is truncated", names none: the image of the pair would be suspected."""
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (64, 64), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-900])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(LabelMapError, match=f"broken label map.*{name}"):
            read_label_map(str(tmp_path / name))
