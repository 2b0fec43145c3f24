"""Every yaml in configs/ is made of known keys, names things that exist, and gives a model of the stated size."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import pytest
import timm

from d2_frozen import tasks
from d2_frozen.neck.build import NECK_NAMES
from d2_frozen.summary import Counts, build_weightless, is_part
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
COCO = CONFIGS / "coco"
EVERY = sorted(CONFIGS.rglob("*.yaml"))
CELLS = sorted([*COCO.glob("table*/*.yaml"), *(CONFIGS / "ade20k").glob("table*/*.yaml")])
_known: dict[str, Counts] = {}


@functools.cache
def _read(path: Path) -> CfgNode:
    # A part of a config does not name its task; the folder does.
    segmentation = is_part(path) and "ade20k" in path.parts
    return tasks.read_config(path, ["MODEL.META_ARCHITECTURE", "FrozenSegmentor"] if segmentation else [])


def read_config(path: Path) -> CfgNode:
    return _read(path).clone()


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def counts_of(cfg: CfgNode) -> Counts:
    """Each distinct model is built once, without weights; seconds for all of them."""
    model = str(cfg.MODEL)
    if model not in _known:
        _known[model] = Counts.of(build_weightless(cfg))
    return _known[model]


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_config_names_existing_things(path: Path) -> None:
    cfg = read_config(path)
    assert cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY
    assert cfg.MODEL.BACKBONE.NAME in BACKBONE_REGISTRY
    assert cfg.MODEL.ROI_HEADS.NAME in ROI_HEADS_REGISTRY
    assert cfg.MODEL.NECK.NAME in NECK_NAMES
    assert timm.is_model(cfg.MODEL.TIMM.NAME)


@pytest.mark.parametrize("path", [path for path in EVERY if not is_part(path)], ids=name_of)
def test_config_gives_a_model(path: Path) -> None:
    counts = counts_of(read_config(path))
    assert 0 < counts.trainable <= counts.total


def test_parameter_counts_in_docs() -> None:
    row = re.compile(r"^\| `(configs/\S+)` *\| *([\d,]+) *\| *([\d,]+) *\|$", re.MULTILINE)
    text = (ROOT / "docs/parameter_counts.md").read_text()
    stated = {
        path: Counts(*(int(n.replace(",", "")) for n in numbers)) for path, *numbers in row.findall(text)
    }
    built = {path.relative_to(ROOT).as_posix(): counts_of(read_config(path)) for path in CELLS}
    assert stated == built, (
        "its tables are what `python -m d2_frozen.summary --table configs/coco` and configs/ade20k print"
    )


@pytest.mark.parametrize("path", CELLS, ids=name_of)
def test_cell_is_what_its_name_and_header_say(path: Path) -> None:
    cfg, text = read_config(path), path.read_text()
    assert text.startswith(f"# python train_net.py --config-file {path.relative_to(ROOT).as_posix()} ")
    assert f"\n# Table {path.parent.name.removeprefix('table')}" in text
    assert ("\n# Not measured here.\n" in text) != ("\n# Measured: " in text)
    multiscale, full = path.stem.endswith("_multiscale"), "_full" in path.stem
    assert (multiscale, "none" if full else "all") == (cfg.TEST.AUG.ENABLED, cfg.MODEL.BACKBONE.FREEZE)
    counts = counts_of(cfg)
    assert (counts.trainable == counts.total) == full


def test_every_cell_of_table_2_is_there() -> None:
    expected = {
        f"{neck}_{head}_{mode}"
        for neck in ("fpn", "residual_fpn", "bifpn")
        for head in ("mask", "cascade", "htc")
        for mode in ("frozen", "full")
    }
    assert {path.stem for path in (COCO / "table2").iterdir()} == expected


def test_every_cell_of_table_3_is_there() -> None:
    folder = CONFIGS / "ade20k/table3"
    for encoder, decoder, mode in itertools.product((1, 6), (3, 9), ("frozen", "full")):
        cfg = read_config(folder / f"encoder_{encoder}_decoder_{decoder}_{mode}.yaml")
        assert encoder == cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS
        assert decoder + 1 == cfg.MODEL.MASK_FORMER.DEC_LAYERS
    assert len(list(folder.iterdir())) == 8


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_less_data_is_the_only_difference_of_table_6(mode: str) -> None:
    whole = read_config(COCO / f"table2/bifpn_mask_{mode}.yaml")
    for percent in (1, 10, 100):
        cfg = read_config(COCO / f"table6/percent_{percent}_{mode}.yaml")
        assert percent == cfg.DATASETS.SUBSET.PERCENT
        cfg.DATASETS.SUBSET, cfg.SOLVER = whole.DATASETS.SUBSET, whole.SOLVER
        assert cfg == whole


def test_test_size_option_can_be_added_to_a_cell(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    bases = [COCO / "table2/bifpn_mask_frozen.yaml", COCO / "base/test_800_1333.yaml"]
    mine.write_text("_BASE_:\n" + "".join(f"  - {base}\n" for base in bases))
    cfg = read_config(mine)
    assert cfg.INPUT.SCALE_CROP.TEST_RESIZE == "shortest_edge" and cfg.MODEL.NECK.NAME == "BiFPN"
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
