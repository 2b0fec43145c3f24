"""Keys are equal for equal files and draws, in every process, and for no others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fvcore.transforms.transform import CropTransform, HFlipTransform, TransformList

from d2_frozen.caching import NotKeyable, entry_key, file_identity
from d2_frozen.caching.keys import canonical
from detectron2.data import transforms as T


@dataclass(frozen=True)
class Change:
    hue: int
    factor: float = 1.0

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return image


def draw(x0: int = 3, new_h: int = 20, hue: int = 5) -> TransformList:
    return TransformList(
        [
            T.ResizeTransform(10, 20, new_h, 40),
            CropTransform(x0, np.int64(1), 8, 8),
            HFlipTransform(8),
            T.ColorTransform(Change(hue)),
        ]
    )


def test_equal_draws_have_equal_keys_and_others_do_not(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    same = {entry_key(str(file), draw()), entry_key(str(file), draw(np.int64(3), 20, np.int32(5)))}
    assert len(same) == 1
    others = {
        entry_key(str(file), one) for one in (draw(4), draw(new_h=21), draw(hue=6), draw().transforms[:3])
    }
    assert len(others) == 4 and not same & others


def test_a_file_is_its_path_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    first = file_identity(str(file))
    file.write_bytes(b"xy")
    os.utime(file, ns=(1, 1))
    second = file_identity(str(file))
    os.utime(file, ns=(1, 2))
    assert len({first, second, file_identity(str(file))}) == 3
    os.utime(file, ns=(1, 1))
    assert file_identity(str(file)) == second
    with pytest.raises(FileNotFoundError):
        file_identity(str(tmp_path / "b.png"))


def test_a_folder_is_the_files_in_it(tmp_path: Path) -> None:
    for name in ("1.jpg", "0.jpg"):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, ns=(1, 1))
    first = file_identity(str(tmp_path))
    assert file_identity(str(tmp_path)) == first
    os.utime(tmp_path / "1.jpg", ns=(1, 2))
    assert file_identity(str(tmp_path)) != first


def test_functions_and_objects_have_no_key() -> None:
    for value in (T.ColorTransform(lambda image: image), object(), np.array([object()])):
        with pytest.raises(NotKeyable):
            canonical(value)


def test_canonical_texts() -> None:
    assert canonical({"b": (1, 2.5), "a": None}) == "{'a': None, 'b': [1, 2.5]}"
    assert (
        canonical(np.zeros(2))
        != canonical(np.zeros(2, np.float32))
        != canonical(np.zeros((2, 1), np.float32))
    )
