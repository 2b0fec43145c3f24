"""A small generated world with label maps, a config that trains on it in seconds, and folders of any label maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import SEGMENTATION, sem_seg_entries, trained_on, write_config

from d2_frozen.data.shapes import generate


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training and 3 held-out pictures of 64 px."""
    folder = tmp_path_factory.mktemp("world")
    generate(folder, train=8, val=3, seed=3, size=64)
    return folder


@pytest.fixture
def tiny_config(tiny_world: Path, tmp_path: Path) -> Path:
    """A yaml over the quickstart's: small everything, seed 7, 4 iterations, output in tmp_path/out."""
    return write_config(
        tmp_path / "tiny.yaml",
        SEGMENTATION,
        trained_on(sem_seg_entries(tiny_world), iterations=4),
        {"INPUT": {"CROP": {"SINGLE_CATEGORY_MAX_AREA": 0.9}, "COLOR_AUG_SSD": True}},
        {"OUTPUT_DIR": f"{tmp_path}/out"},
    )


@pytest.fixture
def label_folders(tmp_path: Path) -> Callable[[Mapping[str, np.ndarray]], tuple[Path, Path]]:
    """``label_folders({"a": labels})`` writes images/a.png of that size, labels/a.png, and gives the two folders."""

    def write(maps: Mapping[str, np.ndarray]) -> tuple[Path, Path]:
        images, labels = tmp_path / "images", tmp_path / "labels"
        for name, array in maps.items():
            for folder in (images, labels):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((*array.shape[:2], 3), 90, np.uint8)).save(images / f"{name}.png")
            Image.fromarray(array).save(labels / f"{name}.png")
        return images, labels

    return write
