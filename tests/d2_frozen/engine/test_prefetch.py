"""Batches that are taken one ahead, as on a GPU, change nothing in a run; here they are brought from CPU to CPU."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2_frozen import joint
from d2_frozen.data.device import one_ahead, with_tensors
from d2_frozen.engine import FrozenTrainer, trainer
from d2_frozen.engine.joint import JointTraining
from d2_frozen.train_net import setup

Flags = Callable[..., Namespace]


def copied(batch: list[Any]) -> list[Any]:
    return [with_tensors(sample, torch.clone) for sample in batch]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Calling it lets trainers made from then on take batches one ahead; each batch is a copy, made in a thread."""

    def switch() -> None:
        monkeypatch.setattr(trainer, "on_device", lambda loader, device, leave: one_ahead(loader, copied))

    return switch


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def assert_equal(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys() and not [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_resumed_run_with_batches_ahead_ends_like_one_without(
    workers: str, flags: Flags, tmp_path: Path, ahead: Callable[[], None]
) -> None:
    FrozenTrainer(setup(flags("OUTPUT_DIR", str(tmp_path / "plain")))).train()
    ahead()
    options = ("OUTPUT_DIR", str(tmp_path / "ahead"), "DATALOADER.NUM_WORKERS", workers)
    cut = FrozenTrainer(setup(flags(*options)))
    cut.max_iter = 3  # as if it had been stopped there: the learning rate is that of the whole run
    cut.train()
    resumed = FrozenTrainer(setup(flags("--resume", *options)))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    assert_equal(tmp_path / "plain", tmp_path / "ahead")


def test_a_bad_image_behind_the_last_iteration_ends_no_run(
    flags: Flags, ahead: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run of 2 iterations, batches 0 and 1; the third is asked for, and fails."""

    def batches(self: FrozenTrainer, start: int) -> Any:
        yield from [next(iter(good)) for _ in range(2)]
        raise OSError("broken image")

    ahead()
    run = FrozenTrainer(setup(flags("SOLVER.MAX_ITER", "2", "TEST.PICTURES", "0")))
    good = run.build_train_loader(run.cfg)
    run.stream.build = lambda start: batches(run, start)
    run.train()
    assert run.iter == 2


def test_joint_heads_share_batches_that_are_ahead(
    tiny_config: Path, tmp_path: Path, ahead: Callable[[], None]
) -> None:
    """Two heads on one stream of data, one on another."""
    files = []
    for name, changes in (("a", ""), ("b", "SOLVER: {MAX_ITER: 4}"), ("c", "SEED: 8")):
        files.append(tiny_config.with_name(f"{name}.yaml"))
        files[-1].write_text(f"_BASE_: {tiny_config}\n{changes}\n")

    def train(folder: Path) -> JointTraining:
        arguments = ["--config-files", *map(str, files), "--output", str(folder)]
        run = JointTraining(joint.build_heads(joint.parse(arguments)))
        run()
        return run

    plain = train(tmp_path / "plain")
    ahead()
    run = train(tmp_path / "ahead")
    assert (run.memory.passes, run.memory.reused) == (plain.memory.passes, plain.memory.reused) == (12, 4)
    for name in "abc":
        assert_equal(tmp_path / "plain" / name, tmp_path / "ahead" / name)
