from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2_frozen import config as frozen_config
from d2_frozen.data import prepare, register
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture(autouse=True)
def forget_datasets():
    """What a test registers is gone after it."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)
        register._registered.pop(name, None)
        prepare._cleaned.pop(name, None)


@pytest.fixture
def make_cfg(tmp_path: Path) -> Callable[..., CfgNode]:
    """``make_cfg(entries, "KEY", value, ...)``: the first entry trains, the second tests."""

    def make(entries: list[dict[str, Any]] = (), *pairs: Any) -> CfgNode:
        cfg = get_cfg()
        # The keys alone; models are not needed here.
        frozen_config._add_model_keys(cfg)
        frozen_config._add_data_keys(cfg)
        frozen_config._add_training_keys(cfg)
        cfg.DATASETS.REGISTER = list(entries)
        cfg.DATASETS.TRAIN = tuple(entry["name"] for entry in entries[:1])
        cfg.DATASETS.TEST = tuple(entry["name"] for entry in entries[1:2])
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = -1
        cfg.MODEL.MASK_ON = True
        cfg.OUTPUT_DIR = str(tmp_path / "out")
        cfg.SEED = 5
        cfg.merge_from_list(list(pairs))
        return cfg

    return make
