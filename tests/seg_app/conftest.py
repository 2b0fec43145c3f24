"""A small generated world with label maps, a config that trains on it in seconds, and folders of any label maps."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2_frozen.data.shapes import generate
from d2_frozen.train_net import argument_parser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training and 3 held-out pictures of 64 px."""
    folder = tmp_path_factory.mktemp("world")
    generate(folder, train=8, val=3, seed=3, size=64)
    return folder


@pytest.fixture
def tiny_config(tiny_world: Path, tmp_path: Path) -> Path:
    """A yaml over the quickstart's: small everything, seed 7, 4 iterations, output in tmp_path/out."""
    text = f"""
_BASE_: {ROOT / "configs/quickstart/segmentation.yaml"}
MODEL:
  DEVICE: cpu
  TIMM: {{PRETRAINED: ""}}
  SEM_SEG_HEAD: {{CONVS_DIM: 32, MASK_DIM: 16}}
  MASK_FORMER: {{DEC_LAYERS: 2, HIDDEN_DIM: 32, DIM_FEEDFORWARD: 32, NUM_OBJECT_QUERIES: 8, TRAIN_NUM_POINTS: 64}}
DATASETS:
  REGISTER:
    - {{name: tiny_seg_train, type: sem_seg, images: {tiny_world}/train, labels: {tiny_world}/labels/train}}
    - {{name: tiny_seg_val, type: sem_seg, images: {tiny_world}/val, labels: {tiny_world}/labels/val}}
  TRAIN: [tiny_seg_train]
  TEST: [tiny_seg_val]
INPUT:
  MIN_SIZE_TRAIN: [48, 64]
  MIN_SIZE_TEST: 48
  CROP: {{SIZE: [48, 48], SINGLE_CATEGORY_MAX_AREA: 0.9}}
  COLOR_AUG_SSD: True
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 4, WARMUP_ITERS: 0, CHECKPOINT_PERIOD: 2}}
DATALOADER: {{NUM_WORKERS: 0}}
TEST: {{PICTURES: 1}}
OUTPUT_DIR: {tmp_path}/out
SEED: 7
"""
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def flags(tiny_config: Path) -> Callable[..., Namespace]:
    """``flags("--resume", "SOLVER.MAX_ITER", "3")`` gives the parsed flags of train_net for the tiny config."""

    def parse(*arguments: str) -> Namespace:
        return argument_parser().parse_args(["--config-file", str(tiny_config), *arguments])

    return parse


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
