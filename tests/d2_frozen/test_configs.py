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
from d2_frozen.summary import Counts, build_weightless, is_part, model_of
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
COCO = CONFIGS / "coco"
EVERY = sorted(CONFIGS.rglob("*.yaml"))
KINETICS = CONFIGS / "kinetics400"
CELLS = sorted(
    [
        *COCO.glob("table*/*.yaml"),
        *(CONFIGS / "ade20k").glob("table*/*.yaml"),
        *KINETICS.glob("table*/*.yaml"),
    ]
)
# A part of a config does not name its task; its folder does.
TASK_OF_FOLDER = {"ade20k": "FrozenSegmentor", "kinetics400": "FrozenVideoClassifier"}
_known: dict[str, Counts] = {}


@functools.cache
def _read(path: Path) -> CfgNode:
    task = next((task for folder, task in TASK_OF_FOLDER.items() if folder in path.parts), None)
    return tasks.read_config(path, ["MODEL.META_ARCHITECTURE", task] if task and is_part(path) else [])


def read_config(path: Path) -> CfgNode:
    return _read(path).clone()


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def counts_of(cfg: CfgNode) -> Counts:
    """Each distinct model is built once, without weights; seconds for all of them."""
    model = model_of(cfg)
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
        "its tables are what `python -m d2_frozen.summary --table configs/coco`, configs/ade20k and "
        "configs/kinetics400 print"
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


def test_every_cell_of_table_4_is_there() -> None:
    """Three heads on one backbone, which sees single frames."""
    heads = {"linear": "LinearVideoHead", "temporal": "TemporalVideoHead", "global": "GlobalVideoHead"}
    for (name, head), mode in itertools.product(heads.items(), ("frozen", "full")):
        cfg = read_config(KINETICS / f"table4/{name}_{mode}.yaml")
        assert head == cfg.MODEL.VIDEO_HEAD.NAME
        assert name == "linear" or cfg.MODEL.VIDEO_HEAD.NUM_BLOCKS == 4
    assert len(list((KINETICS / "table4").iterdir())) == 6


@pytest.mark.parametrize("path", sorted(KINETICS.glob("table*/*.yaml")), ids=name_of)
def test_kinetics_cells_have_the_recipe_of_video_swin(path: Path) -> None:
    """30 epochs of 240,436 videos in batches of 64, 2.5 of them warm-up; 16 frames, every 4th; 4 x 3 views."""
    cfg = read_config(path)
    assert (cfg.VIDEO.NUM_FRAMES, cfg.VIDEO.STRIDE, cfg.VIDEO.CROP_SIZE) == (16, 4, 224)
    assert (cfg.VIDEO.TEST.CLIPS, cfg.VIDEO.TEST.CROPS) == (4, 3)
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == ("ADAMW", 3e-4, 0.05)
    epoch = 240436 / cfg.SOLVER.IMS_PER_BATCH
    assert cfg.SOLVER.IMS_PER_BATCH == 64
    assert cfg.SOLVER.MAX_ITER / epoch == pytest.approx(30, rel=1e-3)
    assert cfg.SOLVER.WARMUP_ITERS / epoch == pytest.approx(2.5, rel=1e-3)
    assert (0.1 if "_full" in path.stem else 1.0) == cfg.SOLVER.BACKBONE_MULTIPLIER


def test_more_frames_can_be_added_to_a_cell(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    bases = [KINETICS / "table4/global_frozen.yaml", KINETICS / "base/frames_32x2.yaml"]
    mine.write_text("_BASE_:\n" + "".join(f"  - {base}\n" for base in bases))
    cfg = read_config(mine)
    assert (cfg.VIDEO.NUM_FRAMES, cfg.VIDEO.STRIDE, cfg.MODEL.VIDEO_HEAD.NAME) == (32, 2, "GlobalVideoHead")
    # 16 more learned positions in time of 1024 channels.
    assert counts_of(cfg).trainable - counts_of(read_config(bases[0])).trainable == 16 * 1024


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
