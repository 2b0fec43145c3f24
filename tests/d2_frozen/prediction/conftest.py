"""Heads without training: one of detection, one of segmentation, on the same random backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import DETECTION, SEGMENTATION, write_config

from d2_frozen import tasks
from d2_frozen.engine import FrozenCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

SaveHead = Callable[..., Path]


@pytest.fixture
def save_head(tmp_path: Path) -> SaveHead:
    """``save_head("det")`` or ``("seg", short_edge=32)`` writes NAME.pth as training does, and gives its path."""

    def save(name: str, *, seed: int = 1, facts: bool = True, short_edge: int = 48, kind: str = "") -> Path:
        kind = kind or name
        changes = {
            "det": {"MODEL": {"ROI_HEADS": {"NUM_CLASSES": -1}, "RPN": {"POST_NMS_TOPK_TEST": 8}}},
            "seg": {
                "MODEL": {"SEM_SEG_HEAD": {"NUM_CLASSES": -1}},
                "INPUT": {"MIN_SIZE_TEST": short_edge, "MAX_SIZE_TEST": 64},
            },
        }[kind]
        tiny = DETECTION if kind == "det" else SEGMENTATION
        config = write_config(tmp_path / f"{name}.yaml", tiny, changes, {"SEED": seed})
        names, ids = (["nut", "bolt"], [3, 7]) if kind == "det" else (["road", "car", "sky"], [0, 1, 2])
        cfg = tasks.read_config(config)
        tasks.task_of(cfg).prediction(cfg, tasks.Classes(names, ids))  # fills in the class count
        seed_all_rng(seed)
        model = build_model(cfg)
        told = {"config": cfg.dump(), "classes": names, "class_ids": ids} if facts else {}
        FrozenCheckpointer(model, str(tmp_path), extra=told).save(name)
        return tmp_path / f"{name}.pth"

    return save


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a.png (64x48), b.png (48x64), sub/c.jpg (64x48)."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, (h, w) in {"a.png": (48, 64), "b.png": (64, 48), "sub/c.jpg": (48, 64)}.items():
        Image.fromarray(draw.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / name)
    return folder
