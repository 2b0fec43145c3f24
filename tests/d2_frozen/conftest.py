"""A small generated world and a config that trains on it in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import DETECTION, coco_entries, trained_on, write_config

from d2_frozen.data.shapes import generate


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 4 held-out pictures of 96 px."""
    folder = tmp_path_factory.mktemp("world")
    generate(folder, train=12, val=4, seed=3, size=96)
    return folder


@pytest.fixture
def tiny_config(tiny_world: Path, tmp_path: Path) -> Path:
    """A yaml over the quickstart's: small everything, fp32, seed 7, 6 iterations, output in tmp_path/out."""
    return write_config(
        tmp_path / "tiny.yaml",
        DETECTION,
        trained_on(coco_entries(tiny_world), iterations=6),
        {"SOLVER": {"WARMUP_ITERS": 2}, "OUTPUT_DIR": f"{tmp_path}/out"},
    )
