"""Where the embedded training loop differs from the original on purpose."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import detectron2
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import AMPTrainer, HookBase, default_argument_parser, default_setup, hooks, launch
from detectron2.solver import maybe_add_gradient_clipping
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer

if not hasattr(detectron2, "EMBEDDED_IN"):
    pytest.skip("about the embedded engine", allow_module_level=True)

_spec = importlib.util.spec_from_file_location(
    "engine_facts", Path(__file__).parents[1] / "contract/test_engine.py"
)
facts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(facts)


def test_amp_is_that_of_the_device_of_what_trains():
    """A frozen part in front may lie elsewhere."""
    model = nn.Sequential(nn.Linear(4, 4, device="meta").requires_grad_(False), nn.Linear(4, 1))
    trainer = AMPTrainer(model, [], torch.optim.SGD(model[1].parameters(), lr=0.1))
    assert trainer.device_type == "cpu" and trainer.precision is torch.bfloat16


def test_a_precision_that_is_none_is_told_before_anything_runs(tmp_path: Path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR, cfg.FLOAT32_PRECISION = str(tmp_path), "tf32"
    with pytest.raises(ValueError, match=r"FLOAT32_PRECISION is 'tf32'; choose highest, high or medium"):
        default_setup(cfg, default_argument_parser().parse_args([]))


def test_amp_on_cpu_is_bfloat16_and_needs_no_scaling():
    seen = []

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.net(x)
            seen.append(y.dtype)
            return {"loss": y.float().pow(2).mean()}

    model = Probe()
    before = model.net.weight.detach().clone()
    trainer = AMPTrainer(
        model, facts.Endless(([[1.0, 2.0, 3.0, 4.0]],)), torch.optim.SGD(model.parameters(), lr=0.01)
    )
    trainer.train(0, 2)
    assert seen == [torch.bfloat16] * 2 and model.net.weight.dtype == torch.float32
    assert not torch.equal(before, model.net.weight)
    trainer.load_state_dict(trainer.state_dict())


def test_after_backward_reaches_the_hooks_of_default_trainer(tmp_path: Path):
    gradients = []

    class Watch(HookBase):
        def after_backward(self) -> None:
            gradients.append(self.trainer.model.a.grad.item())

    trainer = facts.ToyTrainer(facts.toy_config(tmp_path, 2))
    trainer.register_hooks([Watch()])
    trainer.train()
    assert len(gradients) == 2 and gradients[0] == pytest.approx(-6.0)


def test_async_metrics_stop_training_too():
    trainer = facts.simple_trainer(async_write_metrics=True)
    trainer.data_loader = facts.Endless((1.0, float("nan")))
    with pytest.raises(FloatingPointError, match="iteration=1"):
        trainer.train(0, 6)
    assert trainer.iter <= 2


def test_a_loader_that_ends_says_so():
    trainer = facts.simple_trainer()
    trainer.data_loader = [torch.tensor(1.0)]
    with pytest.raises(RuntimeError, match="ended before iteration 1.*MAX_ITER"):
        trainer.train(0, 3)


def test_best_checkpoint_survives_resuming(tmp_path: Path):
    def run(values: list[float], start: int) -> hooks.BestCheckpointer:
        trainer = facts.simple_trainer()
        best = hooks.BestCheckpointer(1, DetectionCheckpointer(trainer.model, str(tmp_path)), "bbox/AP")
        left = iter(values)
        trainer.register_hooks([hooks.EvalHook(1, lambda: {"bbox": {"AP": next(left)}}), best])
        trainer.train(start, start + len(values))
        return best

    run([10.0, 40.0], start=0)
    resumed = run([20.0, 30.0], start=2)
    assert resumed.best_metric == 40.0
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["best_metric"] == {"bbox/AP": 40.0}
    # A run that starts anew does not look at the old file.
    assert run([5.0], start=0).best_metric == 5.0


def test_default_trainer_returns_the_last_results(tmp_path: Path):
    class Evaluated(facts.ToyTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": 12.0}}

    assert Evaluated(facts.toy_config(tmp_path, 1)).train() == {"bbox": {"AP": 12.0}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dist_url": None}, "dist-url"),
        ({"dist_url": "auto", "num_machines": 2}, "one machine"),
        ({"dist_url": "auto", "num_machines": 2, "machine_rank": 2}, "machine-rank"),
    ],
)
def test_launch_says_what_is_missing(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        launch(print, 1 if "num_machines" in options else 2, **options)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log = setup_logger(str(tmp_path), name="full_disk", configure_stdout=False)
    for number in range(3):
        log.info("line %d", number)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == f"{tmp_path}/log.txt cannot be written, and misses lines from now on: [Errno 28] No space left on device"
    )


@pytest.mark.parametrize("kind", ["value", "norm"])
def test_clipping_leaves_out_parameters_without_a_gradient(kind: str):
    """Torch's clipping by value fails on a list of parameters none of which has a gradient."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    reached, unused = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(1.0))
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)([reached, unused], lr=1.0)
    (3 * reached).backward()
    optimizer.step()
    assert reached.item() == pytest.approx(-0.5) and unused.item() == 1


@pytest.mark.parametrize("edge", [float("inf"), float("nan")])
def test_dashes_of_a_box_that_has_no_end_are_not_drawn_for_ever(edge: float):
    drawing = Visualizer(np.zeros((20, 20, 3), np.uint8))
    drawn = drawing.draw_box((4, 4, edge, 16), edge_color="w", alpha=1.0, line_style="--").get_image()
    assert drawn[4:16, 3:5].any() and not drawn[:, 8:].any()  # its left side alone
