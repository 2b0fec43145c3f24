"""configs/zoo holds Detectron2's model zoo: key for key what the original's model_zoo.get_config gave."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from detectron2.config import get_cfg

GOLDEN = Path(__file__).parent / "golden"
ZOO = Path(__file__).resolve().parents[2] / "configs" / "zoo"
FACTS = json.loads((GOLDEN / "zoo.json").read_text())


def _file(name: str) -> Path:
    """configs/zoo has no folders; models of other data sets than COCO have its name in front."""
    folder, _, file = name.rpartition("/")
    dataset = folder.split("-")[0]
    return ZOO / (file if dataset in ("COCO", "Misc", "Detectron1") else f"{dataset}_{file}")


def _differences(cfg):
    spec = importlib.util.spec_from_file_location("make_zoo", GOLDEN / "make_zoo.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker.differences(cfg)


@pytest.mark.parametrize("name", FACTS)
def test_config_is_the_zoos(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(_file(name)))
    assert _differences(cfg) == FACTS[name]["config"]


def test_nothing_else_lies_there():
    named = {_file(name) for name in FACTS}
    assert {path for path in ZOO.iterdir() if not path.name.startswith("Base-")} == named


@pytest.mark.parametrize("path", sorted(ZOO.glob("*.yaml")), ids=lambda path: path.stem)
def test_header_names_its_own_file(path):
    first = path.read_text().splitlines()[0]
    if not path.name.startswith("Base-"):
        assert first == f"# python train_net.py --config-file configs/zoo/{path.name} --num-gpus 8"
