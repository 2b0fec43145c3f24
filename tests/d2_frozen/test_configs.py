"""Every yaml in configs/ is made of known keys, and names things that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from d2_frozen import add_frozen_config
from d2_frozen.neck.build import NECK_NAMES
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_config_names_existing_things(path: Path) -> None:
    cfg = add_frozen_config(get_cfg())
    cfg.merge_from_file(str(path))
    assert cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY
    assert cfg.MODEL.BACKBONE.NAME in BACKBONE_REGISTRY
    assert cfg.MODEL.ROI_HEADS.NAME in ROI_HEADS_REGISTRY
    assert cfg.MODEL.NECK.NAME in NECK_NAMES
    assert timm.is_model(cfg.MODEL.TIMM.NAME)
