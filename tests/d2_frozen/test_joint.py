"""Heads that train together end as if each had been alone, on one backbone and one pass per shared batch."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SEGMENTATION, sem_seg_entries, trained_on, write_config

from d2_frozen import joint, tasks, train_net
from d2_frozen.engine import FrozenTrainer
from d2_frozen.engine.hooks import StoppedBySignal
from d2_frozen.engine.joint import JointTraining, same_batches
from d2_frozen.train_net import argument_parser
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase

ROOT = Path(__file__).resolve().parents[2]
Yaml = Callable[..., Path]


@pytest.fixture
def detection(tiny_config: Path) -> Yaml:
    """``detection("b", "SOLVER: {...}")``: the tiny config under another name, with changes."""

    def write(name: str, changes: str = "") -> Path:
        path = tiny_config.with_name(f"{name}.yaml")
        path.write_text(f"_BASE_: {tiny_config}\n{changes}\n")
        return path

    return write


@pytest.fixture
def segmentation(tiny_world: Path, tmp_path: Path) -> Path:
    """A segmentation head on the same backbone; its data has the names of the detection head's."""
    return write_config(
        tmp_path / "seg.yaml",
        SEGMENTATION,
        trained_on(sem_seg_entries(tiny_world, name="tiny"), iterations=4),
    )


def together(files: list[Path], output: Path, *more: str) -> dict:
    return joint.main(joint.parse(["--config-files", *map(str, files), "--output", str(output), *more]))


def alone(file: Path, output: Path, *more: str) -> dict:
    arguments = ["--config-file", str(file), *more, "OUTPUT_DIR", str(output)]
    # A name may stand for other data in this process: DatasetCatalog is put back afterwards.
    with joint.OwnNames().active():
        return train_net.main(argument_parser().parse_args(arguments))


def content(folder: Path) -> dict:
    return torch.load(folder / "model_final.pth", weights_only=True)


def assert_same(a: dict, b: dict) -> None:
    """Two checkpoints, optimiser's state included, are equal to the last bit."""
    assert (
        a["model"].keys() == b["model"].keys()
        and a["frozen"] == b["frozen"]
        and a["iteration"] == b["iteration"]
    )
    assert not [key for key in a["model"] if not torch.equal(a["model"][key], b["model"][key])]
    first, second = (c["trainer"]["_trainer"]["optimizer"]["state"] for c in (a, b))
    assert all(torch.equal(first[k]["exp_avg"], second[k]["exp_avg"]) for k in first)


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [(row["iteration"], row["total_loss"]) for row in rows if "total_loss" in row]


def test_two_detection_heads_on_one_stream_equal_those_trained_alone(detection: Yaml, tmp_path: Path) -> None:
    files = [
        detection("a"),
        detection("b", "MODEL: {ROI_HEADS: {NAME: CascadeROIHeads}, ROI_BOX_HEAD: {CLS_AGNOSTIC_BBOX_REG: True}}\n"
                       "SOLVER: {BASE_LR: 0.0005, MAX_ITER: 4}"),
    ]  # fmt: skip
    args = joint.parse(["--config-files", *map(str, files), "--output", str(tmp_path / "joint")])
    heads = joint.build_heads(args)
    second = weakref.ref(heads[1].backbones[0].inner)
    run = JointTraining(heads)
    gc.collect()
    assert heads[0].backbones[0] is heads[1].backbones[0] and run.backbones == [[0, 1]]
    assert second() is None  # its memory is free
    results = run()
    # 6 iterations of a, 4 of them shared with b
    assert (run.memory.passes, run.memory.reused) == (6, 4)
    for head, file in zip(heads, files):
        expected = alone(file, tmp_path / f"alone_{head.name}")
        assert str(results[head.name]) == str(expected)
        assert_same(content(tmp_path / "joint" / head.name), content(tmp_path / f"alone_{head.name}"))
        assert losses(tmp_path / "joint" / head.name) == losses(tmp_path / f"alone_{head.name}")


def test_detection_and_segmentation_with_data_of_one_name(
    detection: Yaml, segmentation: Path, tmp_path: Path
) -> None:
    files = [detection("det"), segmentation]
    names = set(DatasetCatalog.list())
    results = together(files, tmp_path / "joint")
    log = (tmp_path / "joint" / "seg" / "log.txt").read_text()
    assert "loss_dice" in log and "loss_box_reg" not in log  # its own lines only
    # What heads register stays theirs; only the app's own names came in.
    assert all(name.startswith("ade20k") for name in set(DatasetCatalog.list()) - names)
    assert {"bbox", "segm"} <= results["det"].keys() and "mIoU" in results["seg"]["sem_seg"]
    for name, file in zip(("det", "seg"), files):
        assert str(results[name]) == str(alone(file, tmp_path / name))
        assert_same(content(tmp_path / "joint" / name), content(tmp_path / name))
        here = {
            p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*") if "events" not in p.name
        }
        there = (tmp_path / "joint" / name).rglob("*")
        assert here == {p.relative_to(tmp_path / "joint" / name) for p in there if "events" not in p.name}


def test_each_head_keeps_its_own_feature_cache(detection: Yaml, tmp_path: Path) -> None:
    cache = "MODEL: {FROZEN: {CACHE: {DIR: %s, VIEWS: 2}}}\nSOLVER: {MAX_ITER: 4}"
    files = [detection(name, cache % (tmp_path / f"cache_{name}")) for name in "ab"] + [detection("c")]
    together(files, tmp_path / "joint", "SOLVER.MAX_ITER", "4")
    for name, file in zip("abc", files):
        alone(file, tmp_path / name, "SOLVER.MAX_ITER", "4")
        assert_same(content(tmp_path / "joint" / name), content(tmp_path / name))
        # What the joint run stored is all that was needed alone.
        rows = map(json.loads, (tmp_path / name / "metrics.json").read_text().splitlines())
        rates = [row["cache/hit_rate"] for row in rows if "cache/hit_rate" in row]
        assert rates == ([] if name == "c" else [1.0] * len(rates)) and (name == "c" or rates)


def test_a_joint_checkpoint_is_read_by_eval_only(detection: Yaml, tmp_path: Path) -> None:
    results = together(
        [detection("a"), detection("b", "SEED: 8")], tmp_path / "joint", "SOLVER.MAX_ITER", "2"
    )
    weights = str(tmp_path / "joint" / "b" / "model_final.pth")
    arguments = [
        "--config-file",
        str(tmp_path / "joint/b/config.yaml"),
        "--eval-only",
        "MODEL.WEIGHTS",
        weights,
    ]
    assert str(train_net.main(argument_parser().parse_args(arguments))) == str(results["b"])


class SignalAfter(HookBase):
    def __init__(self, at: int) -> None:
        self.at = at

    def before_step(self) -> None:
        if self.trainer.iter == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_every_head_and_resume_ends_like_an_uninterrupted_run(
    detection: Yaml, segmentation: Path, tmp_path: Path
) -> None:
    files = [detection("det"), detection("two", "SOLVER: {BASE_LR: 0.0001}"), segmentation]
    together(files, tmp_path / "whole")

    args = joint.parse(["--config-files", *map(str, files), "--output", str(tmp_path / "cut")])
    heads = joint.build_heads(args)
    heads[1].trainer.register_hooks([SignalAfter(1)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal) as left:
        JointTraining(heads)()
    assert left.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
    for name in ("det", "two", "seg"):
        assert (tmp_path / "cut" / name / "last_checkpoint").read_text() == "model_0000001.pth"

    together(files, tmp_path / "cut", "--resume")
    for name in ("det", "two", "seg"):
        assert_same(content(tmp_path / "whole" / name), content(tmp_path / "cut" / name))
    # Everything is complete now: only evaluated.
    assert together(files, tmp_path / "cut", "--resume")["seg"] is not None


def test_sigterm_while_one_head_is_evaluated_saves_all_at_once(
    detection: Yaml, segmentation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        detection("det"),
        detection("two", "TEST: {EVAL_PERIOD: 2}\nSOLVER: {BASE_LR: 0.0001}"),
        segmentation,
    ]
    together(files, tmp_path / "whole")
    args = joint.parse(["--config-files", *map(str, files), "--output", str(tmp_path / "cut")])
    heads = joint.build_heads(args)
    saved: list[str] = []

    def evaluate(cfg: Any, model: Any) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        saved.extend(
            (tmp_path / "cut" / name / "last_checkpoint").read_text() for name in ("det", "two", "seg")
        )
        return {}

    monkeypatch.setattr(heads[1].trainer, "test", evaluate)
    with pytest.raises(StoppedBySignal):
        JointTraining(heads)()
    # The third head's turn in this iteration is after the evaluation of the second.
    assert saved == ["model_0000001.pth", "model_0000001.pth", "model_0000000.pth"]
    together(files, tmp_path / "cut", "--resume")
    for name in ("det", "two", "seg"):
        assert_same(content(tmp_path / "whole" / name), content(tmp_path / "cut" / name))


def test_a_last_evaluation_that_was_interrupted_is_made_up_for(detection: Yaml, tmp_path: Path) -> None:
    """As by train_net: --resume of a complete head printed its results, and neither noted nor compared them."""
    files = [detection("a")]
    results = together(files, tmp_path / "joint", "SOLVER.MAX_ITER", "2")
    metrics = tmp_path / "joint" / "a" / "metrics.json"
    rows = metrics.read_text()
    kept = [row for row in rows.splitlines(keepends=True) if "bbox/AP" not in row]
    metrics.write_text("".join(kept))
    assert metrics.read_text() != rows
    wrong = f"[['bbox', 'AP', {results['a']['bbox']['AP'] + 50.0}, 1.0]]"
    with pytest.raises(SystemExit):
        together(
            files,
            tmp_path / "joint",
            "--resume",
            *("SOLVER.MAX_ITER", "2", "TEST.EXPECTED_RESULTS", wrong),
        )
    assert metrics.read_text() == rows


class FailAt(HookBase):
    def __init__(self, at: int) -> None:
        self.at = at

    def before_step(self) -> None:
        if self.trainer.iter == self.at:
            raise FloatingPointError("this head")


def test_a_head_that_fails_does_not_cost_the_others_their_work_and_they_catch_up(
    detection: Yaml, tmp_path: Path
) -> None:
    files = [detection("a"), detection("b"), detection("c")]
    changes = ("SOLVER.CHECKPOINT_PERIOD", "100")
    together(files, tmp_path / "whole", *changes)
    args = joint.parse(["--config-files", *map(str, files), "--output", str(tmp_path / "cut"), *changes])
    heads = joint.build_heads(args)
    heads[1].trainer.register_hooks([FailAt(3)])
    with pytest.raises(FloatingPointError, match="this head"):
        JointTraining(heads)()
    tags = [tmp_path / "cut" / name / "last_checkpoint" for name in "abc"]
    # a had finished iteration 3 when b failed in it; c had not begun it.
    assert tags[0].read_text() == "model_0000003.pth" and tags[2].read_text() == "model_0000002.pth"
    assert not tags[1].exists()

    heads = joint.build_heads(joint.parse([*_flags(files, tmp_path / "cut"), "--resume", *changes]))
    assert [head.trainer.start_iter for head in heads] == [4, 0, 3]
    run = JointTraining(heads)
    run()
    assert (run.memory.passes, run.memory.reused) == (6, 2 + 3)
    for name in "abc":
        assert_same(content(tmp_path / "whole" / name), content(tmp_path / "cut" / name))


def _flags(files: list[Path], output: Path) -> list[str]:
    return ["--config-files", *map(str, files), "--output", str(output)]


def test_one_folder_for_two_heads_is_refused(detection: Yaml) -> None:
    with pytest.raises(ValueError, match="one OUTPUT_DIR"):
        joint.main(joint.parse(["--config-files", str(detection("a")), str(detection("b"))]))


def test_heads_of_several_precisions_are_refused(detection: Yaml) -> None:
    """All trained, and stored features, in that of the last one."""
    files = [str(detection("a")), str(detection("b", "FLOAT32_PRECISION: high"))]
    with pytest.raises(ValueError, match=r"FLOAT32_PRECISION is '' in .*a\.yaml, 'high' in .*b\.yaml"):
        joint.main(joint.parse(["--config-files", *files, "--output", "never_made"]))


def test_options_may_follow_the_files() -> None:
    args = joint.parse(["--config-files", "a.yaml", "b.yml", "SEED", "3"])
    assert (args.config_files, args.opts) == (["a.yaml", "b.yml"], ["SEED", "3"])


def test_only_equal_loaders_share_batches(detection: Yaml) -> None:
    def loader(*options: str):
        arguments = ["--config-file", str(detection("one")), *options]
        return FrozenTrainer.build_train_loader(train_net.setup(argument_parser().parse_args(arguments)))

    first = loader()
    assert same_batches(first, loader("SOLVER.BASE_LR", "1.0", "DATALOADER.NUM_WORKERS", "2"))
    for other in (("SEED", "8"), ("INPUT.SCALE_CROP.SIZE", "96"), ("SOLVER.IMS_PER_BATCH", "4"),
                  ("DATASETS.SUBSET.PERCENT", "50.0"), ("MODEL.MASK_ON", "False"),
                  ("INPUT.SCALE_CROP.MIN_SCALE", "0.5")):  # fmt: skip
        assert not same_batches(first, loader(*other)), other


def test_networks_of_ones_own_with_other_settings_stay_apart() -> None:
    """A dilation, say: of equal weights. The second head trained on features of the first one's."""
    cfg = tasks.read_config("")
    cfg.MINE = CfgNode({"DILATION": 1})
    kinds = set()
    for builder in ("build_timm_backbone", "build_mine"):
        cfg.MODEL.FROZEN.BOTTOM_UP = builder
        for dilation in (1, 2):
            cfg.MINE.DILATION = dilation
            kinds.add(joint.backbone_settings(cfg))
    assert len(kinds) == 3  # timm's networks do not know of the key


def test_configs_without_their_ending_are_not_taken_for_options(capsys: pytest.CaptureFixture[str]) -> None:
    """`--config-files parts street` would have trained nothing, and said nothing."""
    with pytest.raises(SystemExit):
        joint.parse(["--config-files", "parts", "street"])
    assert "'parts' is no .yaml file" in capsys.readouterr().err
