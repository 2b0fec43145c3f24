"""What must hold of a run: the backbone does not move, a stopped run ends like an uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from d2_frozen import engine_name
from d2_frozen.backbone.timm_backbone import create_timm_backbone
from d2_frozen.backbone.weights import save_weights
from d2_frozen.data.loader import DrawnDataset, SampleError
from d2_frozen.engine import FrozenTrainer
from d2_frozen.engine.hooks import StoppedBySignal
from d2_frozen.engine.trainer import _CPUAutocastTrainer, loop_kind
from d2_frozen.train_net import main, setup
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase

Flags = Callable[..., Namespace]


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = read(first)["model"], read(second)["model"]
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert not differing


class SignalAfter(HookBase):
    """Send this process a signal in the middle of iteration ``at``."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number = at, number

    def before_step(self) -> None:
        if self.trainer.iter == self.at:
            os.kill(os.getpid(), self.number)


def test_backbone_is_bit_identical_after_training_and_not_in_the_checkpoint(
    flags: Flags, tmp_path: Path
) -> None:
    trainer = FrozenTrainer(setup(flags()))
    trainer.resume_or_load(resume=False)
    backbone = trainer.model.frozen_backbone
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    frozen = {f"backbone.bottom_up.{key}" for key in backbone.state_dict()}
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
    trained = [key for key in after if key not in frozen and after[key].is_floating_point()]
    moved = [key for key in trained if not torch.equal(before[key], after[key])]
    assert len(moved) > 0.9 * len(trained)
    saved = read(tmp_path / "out" / "model_final.pth")
    assert set(saved["model"]) == set(after) - frozen
    assert saved["frozen"][0]["sha256"] == backbone.fingerprint()["sha256"]
    assert saved["classes"] == ["disk", "square", "triangle", "star", "ring", "cross"]
    assert saved["class_ids"] == [1, 2, 3, 4, 5, 6] and "FrozenRCNN" in saved["config"]


def test_start_values_follow_the_seed_where_nobody_seeded_the_process(flags: Flags) -> None:
    """As in a notebook, which calls no default_setup; prediction would else find another random backbone."""
    cfg = setup(flags())
    torch.manual_seed(cfg.SEED)
    expected = DefaultTrainer.build_model(cfg).state_dict()
    torch.manual_seed(5)
    trainer = FrozenTrainer(cfg)
    assert all(torch.equal(value, expected[key]) for key, value in trainer.model.state_dict().items())


def test_training_in_a_thread_of_a_larger_program(flags: Flags) -> None:
    cfg = setup(flags("SOLVER.MAX_ITER", "2"))
    with ThreadPoolExecutor(1) as threads:
        assert "bbox" in threads.submit(lambda: FrozenTrainer(cfg).train()).result()


def test_a_test_set_without_class_names_is_told_before_training(flags: Flags) -> None:
    cfg = setup(flags()).clone()
    cfg.defrost()
    records = [{"file_name": "a.jpg", "image_id": 0, "height": 2, "width": 2, "annotations": []}]
    DatasetCatalog.register("without_names_of_test_training", lambda: records)
    cfg.DATASETS.TEST = ("without_names_of_test_training",)
    with pytest.raises(ValueError, match=r"without_names_of_test_training.*thing_classes = \[\.\.\.\]"):
        FrozenTrainer(cfg)

    class Counting(FrozenTrainer):
        @classmethod
        def build_evaluator(cls, cfg: CfgNode, name: str, output_folder: str | None = None) -> Any:
            return None

    assert Counting(cfg).max_iter == 6


def test_a_loader_overridden_as_in_detectron2_trains_and_says_that_a_resumed_run_begins_its_data_anew(
    flags: Flags, caplog: pytest.LogCaptureFixture
) -> None:
    class Trainer(FrozenTrainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:  # type: ignore[override]
            return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))

    cfg = setup(flags("SOLVER.MAX_ITER", "2"))
    for iterations in (2, 3):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.MAX_ITER = iterations
        caplog.clear()
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
        assert trainer.iter == iterations
        assert ("data begins anew" in caplog.text) == (iterations == 3)


def test_expected_results_are_compared_without_a_training_too(flags: Flags, tmp_path: Path) -> None:
    """As in Detectron2: a test job of one's own counts on the exit code."""
    measured = main(flags("SOLVER.MAX_ITER", "1"))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"))
    right, wrong = (f"[['bbox','AP',{measured['bbox']['AP'] + more},0.1]]" for more in (0.0, 50.0))
    main(flags("--eval-only", *weights, "TEST.EXPECTED_RESULTS", right))
    for call in (("--eval-only", *weights), ("--resume", "SOLVER.MAX_ITER", "1")):
        with pytest.raises(SystemExit) as ended:
            main(flags(*call, "TEST.EXPECTED_RESULTS", wrong))
        assert ended.value.code == 1


def test_eval_only_repeats_the_result_to_the_last_digit(flags: Flags, tmp_path: Path) -> None:
    trained = main(flags())
    again = main(flags("--eval-only", "MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")))
    assert str(trained) == str(again)  # as text, so that NaN equals NaN
    assert list((tmp_path / "out" / "inference").glob("predictions_*.jpg"))


@pytest.mark.parametrize("key", ["MODEL.FROZEN.SAVE_FULL_MODEL", "MODEL.BACKBONE.FREEZE"])
def test_eval_only_of_a_file_with_its_backbone_inside_needs_no_other(
    flags: Flags, tmp_path: Path, key: str
) -> None:
    """It failed where the file of MODEL.TIMM.PRETRAINED was not, or fetched what it did not use."""
    weights = tmp_path / "backbone.safetensors"
    save_weights(create_timm_backbone("swinv2_pico_window8_256").network.state_dict(), weights)
    whole = (key, "none" if key.endswith("FREEZE") else "True", "MODEL.TIMM.PRETRAINED", str(weights))
    trained = main(flags(*whole, "SOLVER.MAX_ITER", "1"))
    weights.unlink()
    final = ("MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"))
    assert str(main(flags("--eval-only", *whole, *final))) == str(trained)
    assert str(main(flags("--eval-only", "--resume", *whole))) == str(trained)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_run_stopped_by_sigterm_ends_like_an_uninterrupted_one(
    workers: str, flags: Flags, tmp_path: Path
) -> None:
    whole = FrozenTrainer(setup(flags("OUTPUT_DIR", str(tmp_path / "whole"))))
    whole.train()

    options = ("OUTPUT_DIR", str(tmp_path / "stopped"), "DATALOADER.NUM_WORKERS", workers)
    stopped = FrozenTrainer(setup(flags(*options)))
    stopped.register_hooks([SignalAfter(2, signal.SIGTERM)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal) as left:
        stopped.train()
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "stopped" / "last_checkpoint").read_text() == "model_0000002.pth"

    resumed = FrozenTrainer(setup(flags("--resume", *options)))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    assert_same_weights(tmp_path / "whole" / "model_final.pth", tmp_path / "stopped" / "model_final.pth")


def test_sigterm_during_an_evaluation_saves_at_once(flags: Flags, tmp_path: Path) -> None:
    """A cluster may kill before the evaluation is over."""
    saved: list[bool] = []

    class LongEvaluation(FrozenTrainer):
        @classmethod
        def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
            assert not (tmp_path / "out" / "last_checkpoint").exists()
            os.kill(os.getpid(), signal.SIGTERM)
            saved.append((tmp_path / "out" / "model_0000001.pth").exists())
            return {}

    trainer = LongEvaluation(setup(flags("TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "100")))
    with pytest.raises(StoppedBySignal):
        trainer.train()
    assert saved == [True] and trainer.iter == 2
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000002.pth"
    resumed = FrozenTrainer(setup(flags("--resume")))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    trained, read_again = trainer.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(trained[name], read_again[name]) for name in trained)


def test_a_signal_before_an_evaluation_does_not_wait_for_it(flags: Flags, tmp_path: Path) -> None:
    """It did: the evaluation ran, with nothing saved."""
    evaluated: list[int] = []

    class Evaluated(FrozenTrainer):
        @classmethod
        def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
            evaluated.append(1)
            return {}

    for iteration, saved in ((1, "model_0000001.pth"), (5, "model_final.pth")):  # 5 is the last
        trainer = Evaluated(setup(flags("TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "100")))
        trainer.register_hooks([SignalAfter(iteration, signal.SIGTERM)])
        evaluated.clear()
        with pytest.raises(StoppedBySignal):
            trainer.train()
        assert len(evaluated) == iteration // 2
        assert (tmp_path / "out" / "last_checkpoint").read_text() == saved


KILLED_RUN = """
import os, signal, sys
from d2_frozen.engine import FrozenTrainer
from d2_frozen.train_net import argument_parser, setup
from detectron2.engine import HookBase

class Kill(HookBase):
    def before_step(self):
        if self.trainer.iter == 3:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = FrozenTrainer(setup(argument_parser().parse_args(sys.argv[1:])))
trainer.register_hooks([Kill()])
trainer.train()
"""


def test_run_killed_falls_back_to_the_last_periodic_checkpoint(
    flags: Flags, tiny_config: Path, tmp_path: Path
) -> None:
    whole = FrozenTrainer(setup(flags("OUTPUT_DIR", str(tmp_path / "whole"))))
    whole.train()

    options = ["OUTPUT_DIR", str(tmp_path / "killed")]
    command = [sys.executable, "-c", KILLED_RUN, "--config-file", str(tiny_config), *options]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "last_checkpoint").read_text() == "model_0000001.pth"

    resumed = FrozenTrainer(setup(flags("--resume", *options)))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert_same_weights(tmp_path / "whole" / "model_final.pth", tmp_path / "killed" / "model_final.pth")


def test_a_drawn_seed_is_kept_when_resuming(flags: Flags, tmp_path: Path) -> None:
    first = setup(flags("SEED", "-1", "SOLVER.MAX_ITER", "2"))
    assert first.SEED >= 0
    FrozenTrainer(first).train()
    assert setup(flags("--resume", "SEED", "-1")).SEED == first.SEED


@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
@pytest.mark.parametrize("freeze", ["all", "none"])
def test_trains_in_bfloat16_on_cpu(optimizer: str, freeze: str, flags: Flags) -> None:
    options = ("SOLVER.AMP.ENABLED", "True", "SOLVER.MAX_ITER", "2", "MODEL.BACKBONE.FREEZE", freeze)
    trainer = FrozenTrainer(setup(flags("SOLVER.OPTIMIZER", optimizer, "SOLVER.BASE_LR", "1e-3", *options)))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    bottom_up = [
        key for key in before if key.startswith("backbone.bottom_up.") and before[key].is_floating_point()
    ]
    moved = [key for key in bottom_up if not torch.equal(before[key], trainer.model.state_dict()[key])]
    assert bool(moved) == (freeze == "none")


def test_resuming_a_finished_run_only_evaluates(flags: Flags) -> None:
    done = main(flags("SOLVER.MAX_ITER", "2"))
    assert str(main(flags("--resume", "SOLVER.MAX_ITER", "2"))) == str(done)


def test_the_newest_checkpoints_stay_also_over_an_interruption(flags: Flags, tmp_path: Path) -> None:
    """Written after iterations 1, 3 and 5, and by the signal after 2."""
    one = ("SOLVER.CHECKPOINTS_KEPT", "1")
    trainer = FrozenTrainer(setup(flags(*one)))
    trainer.register_hooks([SignalAfter(2, signal.SIGTERM)])
    trainer.resume_or_load(resume=False)
    with pytest.raises(StoppedBySignal):
        trainer.train()
    saved = {path.name for path in (tmp_path / "out").glob("model_*.pth")}
    assert saved == {"model_0000001.pth", "model_0000002.pth"}
    main(flags("--resume", *one))
    left = {path.name for path in (tmp_path / "out").glob("model_*.pth")}
    assert left == {"model_0000005.pth", "model_final.pth"}
    # Begun anew in the same folder and stopped: what was just written was removed, for its number was the lower one.
    again = FrozenTrainer(setup(flags(*one)))
    again.register_hooks([SignalAfter(2, signal.SIGTERM)])
    again.resume_or_load(resume=False)
    with pytest.raises(StoppedBySignal):
        again.train()
    assert {path.name for path in (tmp_path / "out").glob("model_*.pth")} >= {
        "model_0000001.pth",
        "model_0000002.pth",
    }
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_0000002.pth"
    with pytest.raises(ValueError, match="CHECKPOINTS_KEPT is -1"):
        FrozenTrainer(setup(flags("SOLVER.CHECKPOINTS_KEPT", "-1")))


def test_a_last_evaluation_that_was_interrupted_is_made_up_for(flags: Flags, tmp_path: Path) -> None:
    """--resume of a complete run printed it only. And the best model of the end is of the last iteration, not after."""

    class Graded(FrozenTrainer):
        scores = iter([20.0, KeyboardInterrupt, 40.0, 40.0])

        @classmethod
        def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
            score = next(cls.scores)
            if score is KeyboardInterrupt:
                raise KeyboardInterrupt
            return {"bbox": {"AP": score}}

    options = ("TEST.EVAL_PERIOD", "4", "SOLVER.BEST_CHECKPOINT", "bbox/AP")
    with pytest.raises(KeyboardInterrupt):
        Graded(setup(flags(*options))).train()
    for _ in range(2):  # a second time changes nothing
        trainer = Graded(setup(flags("--resume", *options)))
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == trainer.max_iter == 6
        trainer.record_last_evaluation(trainer.test(trainer.cfg, trainer.model))
        rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
        assert [(row["iteration"], row["bbox/AP"]) for row in rows if "bbox/AP" in row] == [
            (3, 20.0),
            (6, 40.0),
        ]
        best, final = read(tmp_path / "out" / "model_best.pth"), read(tmp_path / "out" / "model_final.pth")
        assert (best["iteration"], final["iteration"]) == (5, 5)
        assert best["best_metric"] == {"bbox/AP": 40.0}
        assert best["trainer"]["iteration"] == final["trainer"]["iteration"] == 5


def test_the_best_checkpoint_stays_also_over_an_interruption(
    flags: Flags, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """AP after iterations 1, 3 and 5 is 20, 40, 30; the signal comes in iteration 4."""

    class Graded(FrozenTrainer):
        scores = iter([20.0, 40.0, 30.0])

        @classmethod
        def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
            return {"bbox": {"AP": next(cls.scores)}}

    options = ("TEST.EVAL_PERIOD", "2", "SOLVER.BEST_CHECKPOINT", "bbox/AP")
    trainer = Graded(setup(flags(*options)))
    trainer.register_hooks([SignalAfter(4, signal.SIGTERM)])
    with pytest.raises(StoppedBySignal):
        trainer.train()
    resumed = Graded(setup(flags("--resume", *options)))
    resumed.resume_or_load(resume=True)
    resumed.train()
    best, final = read(tmp_path / "out" / "model_best.pth"), read(tmp_path / "out" / "model_final.pth")
    assert (best["iteration"], final["iteration"]) == (3, 5)
    assert_same_weights(tmp_path / "out" / "model_best.pth", tmp_path / "out" / "model_0000003.pth")
    assert "bbox/AP is 40.0000, the best so far (before: 20.0000)" in caplog.text

    # Begun anew in the folder and stopped before an evaluation: the best of the other run is none of this one's.
    Graded.scores = iter([5.0, 10.0, 7.0])
    trainer = Graded(setup(flags(*options)))
    trainer.register_hooks([SignalAfter(1, signal.SIGTERM)])
    with pytest.raises(StoppedBySignal):
        trainer.train()
    resumed = Graded(setup(flags("--resume", *options)))
    resumed.resume_or_load(resume=True)
    resumed.train()
    best = read(tmp_path / "out" / "model_best.pth")
    assert (best["iteration"], best["best_metric"]) == (5, {"bbox/AP": 10.0})

    with pytest.raises(ValueError, match="nothing is evaluated before the end"):
        setup(flags("SOLVER.BEST_CHECKPOINT", "bbox/AP"))
    caplog.clear()
    Graded.scores = iter([1.0] * 3)
    Graded(setup(flags("TEST.EVAL_PERIOD", "2", "SOLVER.BEST_CHECKPOINT", "box/AP"))).train()
    (told,) = [
        one.getMessage() for one in caplog.records if "which the evaluation does not give" in one.getMessage()
    ]
    assert told.endswith("It gives bbox/AP.")


def test_no_best_checkpoint_without_labels_to_test_on(flags: Flags, caplog: pytest.LogCaptureFixture) -> None:
    class Unlabelled(FrozenTrainer):
        @classmethod
        def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
            return {}

    options = ("SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "1", "SOLVER.BEST_CHECKPOINT", "bbox/AP")
    Unlabelled(setup(flags(*options))).train()
    assert (
        "no model_best.pth is written. It gives nothing, as where the test data has no labels." in caplog.text
    )


def test_mixed_precision_is_that_of_the_device_of_the_config(flags: Flags) -> None:
    """Not of the first parameter: below fp32 the weights of a frozen network stay on the CPU, and come first."""
    options = ("MODEL.FROZEN.PRECISION", "bf16", "SOLVER.AMP.ENABLED", "True")
    trainer = FrozenTrainer(setup(flags(*options)))
    assert type(trainer._trainer) is _CPUAutocastTrainer
    cfg = trainer.cfg.clone()
    cfg.defrost()
    for device in ("cuda", "cuda:1"):
        cfg.MODEL.DEVICE = device
        assert loop_kind(cfg) is AMPTrainer
    first = next(trainer.model.parameters())
    assert not first.requires_grad, "or this test is about nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["False", "True"])
def test_on_a_gpu_heads_train_in_float16_on_a_backbone_in_bfloat16(flags: Flags, compile: str) -> None:
    options = ("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True")
    frozen = ("MODEL.FROZEN.PRECISION", "bf16", "MODEL.FROZEN.COMPILE", compile)
    trainer = FrozenTrainer(setup(flags(*options, *frozen, "DATASETS.TEST", "()")))
    trainer.resume_or_load(resume=False)
    seen = set()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.requires_grad:
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.float16}
    assert all(p.is_cuda and p.dtype == torch.float32 and p.isfinite().all() for p in trained.values())
    # The first steps may be left out, until the scale of the loss fits.
    assert trainer._trainer.grad_scaler.get_scale() >= 1
    assert any(not torch.equal(before[name], p) for name, p in trained.items())


def test_too_little_gpu_memory_is_answered_with_what_needs_less(flags: Flags, tmp_path: Path) -> None:
    trainer = FrozenTrainer(setup(flags("SOLVER.AMP.ENABLED", "True", "SOLVER.IMS_PER_BATCH", "2")))

    def full() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    trainer._trainer.run_step = full
    with pytest.raises(torch.cuda.OutOfMemoryError):
        trainer.train()
    said = (tmp_path / "out" / "log.txt").read_text().partition("Iteration 0 needs more GPU memory")[2]
    said = said.partition("Traceback")[0]
    assert "MODEL.USE_ACT_CHECKPOINT: True (same results, slower); now False" in said
    assert "SOLVER.IMS_PER_BATCH: fewer, and SOLVER.BASE_LR with them; now 2" in said
    # These are so already.
    assert "AMP" not in said and "FREEZE" not in said


# As on a disk that is full: in iterations 1 and 2 no file of the process becomes larger than 1 MB.
FULL_DISK_RUN = """
import resource, sys
from d2_frozen.engine import FrozenTrainer, hooks
from d2_frozen.train_net import argument_parser, setup
from detectron2.engine import HookBase

class SmallFiles(HookBase):
    def before_step(self):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        full = self.trainer.iter in (1, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 if full else hard, hard))

hooks._TRY_AGAIN = 2
trainer = FrozenTrainer(setup(argument_parser().parse_args(sys.argv[1:])))
trainer.register_hooks([SmallFiles()])
trainer.resume_or_load(resume=False)
trainer.train()
"""


def run_on_a_full_disk(config: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    pytest.importorskip("resource")
    options = ("OUTPUT_DIR", str(out), "DATASETS.TEST", "()", *options)
    command = [sys.executable, "-c", FULL_DISK_RUN, "--config-file", str(config), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_disk_that_is_full_for_a_while_costs_no_training(tiny_config: Path, tmp_path: Path) -> None:
    """The checkpoint after iteration 1 cannot be written, and follows after 3, when there is room."""
    out = tmp_path / "out"
    options = ("SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "5")
    done = run_on_a_full_disk(tiny_config, out, *options)
    assert done.returncode == 0, done.stderr
    log = (out / "log.txt").read_text()
    assert "No checkpoint after iteration 1: [Errno 27] File too large; not written" in log
    assert f"{out}/model_0000001.pth" in log
    assert sorted(path.name for path in out.glob("*model*")) == ["model_0000003.pth", "model_final.pth"]
    assert read(out / "model_final.pth")["iteration"] == 4


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tiny_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_on_a_full_disk(tiny_config, out, "SOLVER.MAX_ITER", "2")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"OSError: .*not written.*model_0000001\.pth", last)
    assert not list(out.glob("*model*"))


@pytest.mark.skipif(engine_name() == "embedded", reason="needs an installed Detectron2")
def test_keypoint_heads_of_an_installed_detectron2(flags: Flags) -> None:
    cfg = setup(flags("SOLVER.MAX_ITER", "2")).clone()
    cfg.defrost()
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    for record in records:
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation.update(keypoints=[x + 1.0, y + 1.0, 2, x + w - 1.0, y + h - 1.0, 2], num_keypoints=2)
    DatasetCatalog.register("keypoints_of_test_training", lambda: records)
    MetadataCatalog.get("keypoints_of_test_training").set(
        thing_classes=MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes,
        keypoint_names=["left", "right"],
        keypoint_flip_map=[("left", "right")],
    )
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("keypoints_of_test_training",)
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = 2, [8]
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    assert set(FrozenTrainer(cfg).train()) == {"bbox", "segm", "keypoints"}


def test_an_image_that_goes_bad_and_a_failing_evaluation_cost_no_training(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are saved before the run ends, and resumed it ends like an uninterrupted one."""
    never = ("SOLVER.CHECKPOINT_PERIOD", "1000", "TEST.EVAL_PERIOD", "4")
    main(flags("OUTPUT_DIR", str(tmp_path / "whole"), *never))
    out, seen = tmp_path / "out", []
    mapped = DrawnDataset._mapped

    def bad_at_position_5(self: DrawnDataset, record: Any, position: int, redraw: int) -> Any:
        if position == 5:
            raise OSError("truncated")
        return mapped(self, record, position, redraw)

    with monkeypatch.context() as patch:
        patch.setattr(DrawnDataset, "_mapped", bad_at_position_5)
        with pytest.raises(SampleError, match="truncated"):
            main(flags(*never))
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"

    def failing(*_: object) -> None:
        seen.append(1)
        raise RuntimeError("evaluation")

    with monkeypatch.context() as patch:
        patch.setattr(FrozenTrainer, "test", failing)
        with pytest.raises(RuntimeError, match="evaluation"):
            main(flags("--resume", *never))
    assert seen and (out / "last_checkpoint").read_text() == "model_0000003.pth"
    main(flags("--resume", *never))
    assert_same_weights(tmp_path / "whole" / "model_final.pth", out / "model_final.pth")


def test_data_that_fails_in_another_way_costs_no_training(flags: Flags, tmp_path: Path) -> None:
    """Workers that the system ends again and again, a loader of one's own: what was trained was lost."""

    class Fails(FrozenTrainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode, start_iteration: int = 0) -> Any:
            yield from islice(super().build_train_loader(cfg, start_iteration), 2)
            raise RuntimeError("DataLoader worker (pid 1) is killed")

    trainer = Fails(setup(flags("SOLVER.CHECKPOINT_PERIOD", "1000", "DATASETS.TEST", "()")))
    with pytest.raises(RuntimeError, match="is killed"):
        trainer.train()
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert read(tmp_path / "out" / "model_0000001.pth")["iteration"] == 1
