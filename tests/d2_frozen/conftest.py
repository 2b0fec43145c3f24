"""A small generated world and a config that trains on it in seconds."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from d2_frozen.data.shapes import generate
from d2_frozen.train_net import argument_parser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 4 held-out pictures of 96 px."""
    folder = tmp_path_factory.mktemp("world")
    generate(folder, train=12, val=4, seed=3, size=96)
    return folder


@pytest.fixture
def tiny_config(tiny_world: Path, tmp_path: Path) -> Path:
    """A yaml over the quickstart's: small everything, fp32, seed 7, 6 iterations, output in tmp_path/out."""
    text = f"""
_BASE_: {ROOT / "configs/quickstart/detection.yaml"}
MODEL:
  DEVICE: cpu
  TIMM: {{PRETRAINED: ""}}
  FPN: {{OUT_CHANNELS: 64}}
  BIFPN: {{NUM_LAYERS: 1}}
  ROI_BOX_HEAD: {{FC_DIM: 32}}
  ROI_MASK_HEAD: {{NUM_CONV: 1, CONV_DIM: 16}}
  RPN: {{BATCH_SIZE_PER_IMAGE: 32, POST_NMS_TOPK_TRAIN: 32, POST_NMS_TOPK_TEST: 16}}
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 16}}
DATASETS:
  REGISTER:
    - {{name: tiny_train, type: coco_instances, json: {tiny_world}/train.json, images: {tiny_world}/train}}
    - {{name: tiny_val, type: coco_instances, json: {tiny_world}/val.json, images: {tiny_world}/val}}
  TRAIN: [tiny_train]
  TEST: [tiny_val]
INPUT: {{SCALE_CROP: {{SIZE: 64}}}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 6, WARMUP_ITERS: 2, CHECKPOINT_PERIOD: 2}}
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
