"""The training loop: order of hooks, what is logged and saved, resuming, defaults."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fvcore.common.param_scheduler import LinearParamScheduler
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    default_argument_parser,
    default_setup,
    hooks,
    launch,
)
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, get_event_storage


class Line(nn.Module):
    """y = a x; the loss of target 3x is (a - 3)^2 x^2, and a second loss is constant."""

    def __init__(self, a: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss_fit": ((self.a - 3) ** 2 * x**2).sum(), "loss_one": torch.ones(()) + 0 * self.a.sum()}


class Endless:
    def __init__(self, values: tuple = (1.0,)) -> None:
        self.values = values

    def __iter__(self):
        while True:
            yield from (torch.tensor(v) for v in self.values)


def simple_trainer(lr: float = 0.25, cls: type = SimpleTrainer, **options) -> SimpleTrainer:
    model = Line()
    return cls(model, Endless(), torch.optim.SGD(model.parameters(), lr=lr), **options)


class Recorder(HookBase):
    def __init__(self, log: list) -> None:
        self.log = log

    def _note(self, moment: str) -> None:
        self.log.append((moment, self.trainer.iter))

    def before_train(self):
        self._note("before_train")

    def after_train(self):
        self._note("after_train")

    def before_step(self):
        self._note("before_step")

    def after_backward(self):
        self._note("after_backward")

    def after_step(self):
        self._note("after_step")


def test_a_step_is_gradient_descent():
    """a <- a - lr * 2 (a - 3): from 0 with lr 0.25 to 1.5, then 2.25."""
    trainer = simple_trainer()
    trainer.train(0, 2)
    assert trainer.model.a.item() == pytest.approx(2.25)
    assert trainer.iter == 2


def test_hooks_are_called_in_order():
    log: list = []
    trainer = simple_trainer()
    trainer.register_hooks([Recorder(log), None])
    trainer.train(3, 5)
    steps = [(moment, i) for i in (3, 4) for moment in ("before_step", "after_backward", "after_step")]
    assert log == [("before_train", 3), *steps, ("after_train", 5)]


def test_hooks_run_in_the_order_of_registration():
    order: list = []
    trainer = simple_trainer()
    trainer.register_hooks(
        [hooks.CallbackHook(after_step=lambda t, k=k: order.append((k, t.iter))) for k in "ab"]
    )
    trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: order.append(("c", t.iter)))])
    trainer.train(0, 2)
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("c", 1)]


def test_losses_are_logged():
    trainer = simple_trainer()
    seen = []
    trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: seen.append(dict(t.storage.latest())))])
    trainer.train(0, 2)
    assert seen[0]["loss_fit"] == (pytest.approx(9.0), 0)
    assert seen[1]["total_loss"] == (pytest.approx(2.25 + 1.0), 1)
    assert seen[1]["loss_one"] == (1.0, 1) and seen[1]["data_time"][1] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(value: float):
    trainer = simple_trainer()
    trainer.data_loader = Endless((1.0, value))
    log: list = []
    trainer.register_hooks([Recorder(log)])
    with pytest.raises(FloatingPointError, match="(?s)iteration=1.*loss_fit"):
        trainer.train(0, 5)
    assert log[-1] == ("after_train", 1)
    assert trainer.model.a.item() == pytest.approx(1.5)


def test_gather_metric_period():
    trainer = simple_trainer(gather_metric_period=3)
    iterations = []
    trainer.register_hooks(
        [
            hooks.CallbackHook(
                after_step=lambda t: iterations.append(t.storage.latest().get("total_loss", (0, -1))[1])
            )
        ]
    )
    trainer.train(0, 6)
    assert iterations == [-1, -1, 2, 2, 2, 5]


def test_zero_grad_before_forward_gives_the_same_weights():
    before, after = simple_trainer(zero_grad_before_forward=True), simple_trainer()
    before.train(0, 3)
    after.train(0, 3)
    assert torch.equal(before.model.a, after.model.a)


def test_async_metrics_arrive():
    trainer = simple_trainer(async_write_metrics=True)
    trainer.train(0, 4)
    assert trainer.storage.history("total_loss").values()[0] == (pytest.approx(10.0), 0)


def test_trainer_state_is_iteration_and_optimizer():
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = SimpleTrainer(model, Endless(), optimizer)
    trainer.train(0, 3)
    state = trainer.state_dict()
    assert state["iteration"] == 3 and "hooks" not in state
    fresh = simple_trainer()
    fresh.load_state_dict(state)
    assert fresh.iter == 3
    assert fresh.optimizer.state_dict()["state"][0]["momentum_buffer"] is not None


def test_lr_scheduler_of_fvcore():
    """From 1 to 0 times the initial rate over the run, logged before it is changed."""
    trainer = simple_trainer(lr=0.1)
    rates = []
    trainer.register_hooks(
        [
            hooks.LRScheduler(scheduler=LinearParamScheduler(1.0, 0.0)),
            hooks.CallbackHook(after_step=lambda t: rates.append(t.storage.latest()["lr"][0])),
        ]
    )
    trainer.train(0, 4)
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert trainer.state_dict()["hooks"]["LRScheduler"]["last_epoch"] == 4


def test_the_logged_rate_is_that_of_the_largest_group():
    def group(lr: float, count: int) -> dict:
        return {"params": [nn.Parameter(torch.zeros(1)) for _ in range(count)], "lr": lr}

    best = hooks.LRScheduler.get_best_param_group_id
    assert best(torch.optim.SGD([group(0.1, 1), group(0.2, 3), group(0.3, 2)])) == 1
    assert best(torch.optim.SGD([group(0.1, 1), group(0.2, 1), group(0.2, 1)])) == 1


def test_eval_hook_period_and_end():
    at: list = []
    trainer = simple_trainer()
    trainer.register_hooks([hooks.EvalHook(2, lambda: at.append(trainer.iter) or {"bbox": {"AP": 7.0}})])
    trainer.train(0, 6)
    # After iterations 1 and 3; the last evaluation comes when training is over, once.
    assert at == [1, 3, 6]
    assert trainer.storage.latest()["bbox/AP"] == (7.0, 6)


def test_eval_hook_not_after_a_failure_and_not_without_being_asked():
    calls: list = []
    trainer = simple_trainer()
    trainer.data_loader = Endless((1.0, float("nan")))
    trainer.register_hooks([hooks.EvalHook(0, lambda: calls.append(1))])
    with pytest.raises(FloatingPointError):
        trainer.train(0, 6)
    trainer = simple_trainer()
    trainer.register_hooks([hooks.EvalHook(0, lambda: calls.append(2), eval_after_train=False)])
    trainer.train(0, 2)
    assert calls == []


def test_eval_hook_wants_numbers():
    trainer = simple_trainer()
    trainer.register_hooks([hooks.EvalHook(0, lambda: {"bbox": {"AP": "many"}})])
    with pytest.raises(ValueError, match="bbox/AP.*many"):
        trainer.train(0, 1)


class Noting(EventWriter):
    def __init__(self, log: list) -> None:
        self.log = log

    def write(self) -> None:
        self.log.append(get_event_storage().iter)

    def close(self) -> None:
        self.log.append("closed")


def test_writers_write_by_period_at_the_end_and_are_closed():
    log: list = []
    trainer = simple_trainer()
    trainer.register_hooks([hooks.PeriodicWriter([Noting(log)], period=2)])
    trainer.train(0, 5)
    assert log == [1, 3, 4, 5, "closed"]


def test_metrics_json(tmp_path: Path):
    trainer = simple_trainer()
    trainer.register_hooks(
        [hooks.IterationTimer(), hooks.PeriodicWriter([JSONWriter(str(tmp_path / "metrics.json"))], period=2)]
    )
    trainer.train(0, 6)
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 3, 5]
    assert {"total_loss", "loss_fit", "data_time"} <= set(rows[0])
    # The first iterations are warm-up.
    assert "time" not in rows[0] and "time" in rows[1]


def test_periodic_checkpoints_and_resuming_after_the_saved_iteration(tmp_path: Path):
    def build() -> tuple[SimpleTrainer, DetectionCheckpointer]:
        trainer = simple_trainer(lr=0.1)
        checkpointer = DetectionCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
        trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, 3)])
        return trainer, checkpointer

    trainer, _ = build()
    trainer.train(0, 4)
    assert sorted(f.name for f in tmp_path.glob("*.pth")) == ["model_0000002.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text().strip() == "model_final.pth"
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")

    resumed, checkpointer = build()
    checkpointer.resume_or_load("", resume=True)
    assert resumed.iter == 2
    resumed.train(resumed.iter + 1, 4)
    assert torch.equal(resumed.model.a, trainer.model.a)


def test_best_checkpointer(tmp_path: Path):
    values = iter([10.0, 30.0, 20.0, float("nan")])
    trainer = simple_trainer()
    checkpointer = DetectionCheckpointer(trainer.model, str(tmp_path))
    trainer.register_hooks(
        [
            hooks.EvalHook(1, lambda: {"bbox": {"AP": next(values)}}),
            hooks.BestCheckpointer(1, checkpointer, "bbox/AP"),
        ]
    )
    trainer.train(0, 4)
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["iteration"] == 1
    # The weight after two steps.
    assert saved["model"]["a"].item() == pytest.approx(2.25)


def test_precise_bn_takes_the_average_of_batch_statistics():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.bn(x).sum()}

    model = Normed().train()
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])]
    with EventStorage():
        hooks.PreciseBN(0, model, batches, 2).update_stats()
    assert model.bn.running_mean.item() == pytest.approx(3.0)


def test_exceptions_reach_the_caller_after_after_train():
    class Failing(TrainerBase):
        def run_step(self):
            raise KeyError("missing")

    log: list = []
    trainer = Failing()
    trainer.register_hooks([Recorder(log)])
    with pytest.raises(KeyError):
        trainer.train(0, 3)
    assert log == [("before_train", 0), ("before_step", 0), ("after_train", 0)]


@pytest.mark.gpu
def test_amp_trainer_on_gpu():
    model = nn.Linear(4, 1).cuda()
    wrapped = nn.Module()
    wrapped.net = model
    wrapped.forward = lambda x: {"loss": model(x.cuda()).float().pow(2).mean()}

    class Batches:
        def __iter__(self):
            while True:
                yield torch.ones(2, 4)

    trainer = AMPTrainer(wrapped, Batches(), torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.weight.detach().clone()
    trainer.train(0, 3)
    assert not torch.equal(before, model.weight) and "grad_scaler" in trainer.state_dict()


def test_flags():
    args = default_argument_parser().parse_args([])
    assert (args.config_file, args.resume, args.eval_only, args.num_gpus) == ("", False, False, 1)
    assert (args.num_machines, args.machine_rank, args.opts) == (1, 0, [])
    assert args.dist_url.startswith("tcp://127.0.0.1:")
    line = "--config-file a.yaml --resume --eval-only --num-gpus 2 --num-machines 3 --machine-rank 1"
    line += " --dist-url auto SOLVER.BASE_LR 0.1"
    args = default_argument_parser().parse_args(line.split())
    assert (args.config_file, args.resume, args.eval_only, args.num_gpus) == ("a.yaml", True, True, 2)
    assert (args.num_machines, args.machine_rank, args.dist_url) == (3, 1, "auto")
    assert args.opts == ["SOLVER.BASE_LR", "0.1"]


def test_the_precision_of_float32_products_is_set_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for gpu, wanted, found in (
            (False, "medium", before),
            (True, "medium", ("medium", True)),
            (True, "", ("medium", True)),
            (True, "highest", ("highest", False)),
            (True, "high", ("high", True)),
        ):
            cfg = get_cfg()
            cfg.OUTPUT_DIR, cfg.FLOAT32_PRECISION = str(tmp_path / "out"), wanted
            monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
            monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "")
            default_setup(cfg, default_argument_parser().parse_args([]))
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == found
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        for name in ("detectron2", "fvcore"):
            logging.getLogger(name).handlers.clear()


def test_default_setup_records_the_run(tmp_path: Path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.SEED = 5
    cfg.freeze()
    default_setup(cfg, default_argument_parser().parse_args([]))
    drawn = torch.rand(1)
    default_setup(cfg, default_argument_parser().parse_args([]))
    assert torch.equal(drawn, torch.rand(1))
    written = get_cfg()
    written.merge_from_file(str(tmp_path / "out/config.yaml"))
    assert (written.SEED, written.OUTPUT_DIR) == (5, cfg.OUTPUT_DIR) and set(written) == set(cfg)
    for name in ("detectron2", "fvcore"):
        logging.getLogger(name).handlers.clear()


def test_auto_scale_workers():
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.MAX_ITER = 1000
    cfg.SOLVER.STEPS = (600, 900)
    cfg.SOLVER.WARMUP_ITERS = 100
    cfg.SOLVER.CHECKPOINT_PERIOD = 500
    cfg.TEST.EVAL_PERIOD = 50
    cfg.freeze()
    scaled = DefaultTrainer.auto_scale_workers(cfg, 16)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR, scaled.SOLVER.MAX_ITER) == (32, 0.2, 500)
    assert (scaled.SOLVER.STEPS, scaled.SOLVER.WARMUP_ITERS, scaled.SOLVER.CHECKPOINT_PERIOD) == (
        (300, 450),
        50,
        250,
    )
    assert scaled.TEST.EVAL_PERIOD == 25 and scaled.SOLVER.REFERENCE_WORLD_SIZE == 16 and scaled.is_frozen()
    assert DefaultTrainer.auto_scale_workers(cfg, 8) is cfg


class ToyTrainer(DefaultTrainer):
    """DefaultTrainer of a one-parameter model: everything but model and data is the default."""

    @classmethod
    def build_model(cls, cfg):
        return Line()

    @classmethod
    def build_train_loader(cls, cfg):
        return Endless()


def toy_config(folder: Path, iterations: int):
    cfg = get_cfg()
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.MAX_ITER = iterations
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.WARMUP_ITERS = 4
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    return cfg


def test_default_trainer_resumes_to_the_same_weights(tmp_path: Path):
    def run(folder: Path, resume: bool, stop_at: int | None = None) -> ToyTrainer:
        trainer = ToyTrainer(toy_config(folder, 6))
        trainer.resume_or_load(resume=resume)

        def stop(t: TrainerBase) -> None:
            if t.iter == stop_at:
                raise KeyboardInterrupt

        trainer.register_hooks([hooks.CallbackHook(after_step=stop)])
        if stop_at is None:
            trainer.train()
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        return trainer

    whole = run(tmp_path / "whole", resume=False)
    assert whole.iter == 6 and os.path.exists(tmp_path / "whole/model_final.pth")
    run(tmp_path / "parts", resume=False, stop_at=4)
    resumed = run(tmp_path / "parts", resume=True)
    # Saved after iterations 1 and 3; stopped in iteration 4, which is run again.
    assert resumed.start_iter == 4
    assert torch.equal(whole.model.a, resumed.model.a)
    assert whole.scheduler.state_dict()["last_epoch"] == resumed.scheduler.state_dict()["last_epoch"] == 6
    # Without --resume the same folder starts anew.
    assert run(tmp_path / "parts", resume=False).start_iter == 0


def test_default_trainer_hooks_and_proxies(tmp_path: Path):
    trainer = ToyTrainer(toy_config(tmp_path, 2))
    names = [type(hook).__name__ for hook in trainer._hooks]
    assert names == ["IterationTimer", "LRScheduler", "PeriodicCheckpointer", "EvalHook", "PeriodicWriter"]
    assert trainer.model is trainer._trainer.model and trainer.optimizer is trainer._trainer.optimizer
    assert isinstance(trainer._trainer, SimpleTrainer) and trainer.start_iter == 0 and trainer.max_iter == 2


def test_without_an_evaluator_datasets_are_skipped(tmp_path: Path):
    cfg = toy_config(tmp_path, 1)
    assert ToyTrainer.test(cfg, Line()) == {}
    with pytest.raises(NotImplementedError, match="build_evaluator"):
        ToyTrainer.build_evaluator(cfg, "x")


def _write_rank(folder: str) -> None:
    total = sum(comm.all_gather(comm.get_rank() + 1))
    (Path(folder) / f"rank{comm.get_rank()}").write_text(f"{comm.get_world_size()} {total}")


def test_launch_in_this_process(tmp_path: Path):
    launch(_write_rank, 1, args=(str(tmp_path),))
    assert (tmp_path / "rank0").read_text() == "1 1"


def test_launch_two_processes(tmp_path: Path):
    # Spawned processes import the launched function by its module's name, which a file given to Python always has.
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from detectron2.engine import launch\nfrom detectron2.utils import comm\n"
        + inspect.getsource(_write_rank)
        + "if __name__ == '__main__':\n    launch(_write_rank, 2, dist_url='auto', args=(sys.argv[1],))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, check=True)
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["2 3", "2 3"]


def test_losses_are_finite_numbers_at_the_end():
    trainer = simple_trainer(lr=0.1)
    trainer.train(0, 30)
    assert math.isclose(trainer.model.a.item(), 3.0, abs_tol=0.02)


def test_memory_statistics_need_no_arguments():
    trainer = simple_trainer()
    trainer.register_hooks([hooks.TorchMemoryStats(), hooks.TorchMemoryStats(period=1, max_runs=1)])
    trainer.train(0, 2)


def test_a_hook_has_no_trainer_until_it_is_registered():
    hook = HookBase()
    assert hook.trainer is None
    trainer = simple_trainer()
    trainer.register_hooks([hook])
    assert hook.trainer.iter == 0
