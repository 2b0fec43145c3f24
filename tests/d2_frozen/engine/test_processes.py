"""Two processes, one model: what is frozen and what trains is the same in both."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from d2_frozen.engine import FrozenTrainer
from d2_frozen.engine.trainer import require_equal_frozen_parts
from d2_frozen.train_net import argument_parser, setup
from detectron2.utils import comm


def _both(config_file: str, folder: str) -> None:
    """Writes the weights of this process at the start, after an iteration, and the error where processes differ."""
    flags = argument_parser().parse_args(
        ["--config-file", config_file, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    )
    trainer = FrozenTrainer(setup(flags))
    model = trainer.model_without_ddp
    content = {"start": copy.deepcopy(model.state_dict())}
    trainer.train()
    content["end"] = copy.deepcopy(model.state_dict())
    if comm.get_rank() == 1:
        with torch.no_grad():
            next(model.frozen_backbone.parameters()).mul_(2)
    try:
        require_equal_frozen_parts(model)
    except RuntimeError as error:
        content["error"] = str(error)
    torch.save(content, Path(folder) / f"{comm.get_rank()}.pth")


def _launch_two(folder: Path, function: Callable[..., None], *arguments: str) -> None:
    """``function(*arguments)`` in two processes."""
    # Spawned processes import the launched function by its module's name, which a file given to Python always has.
    script = folder / "launched.py"
    script.write_text(
        Path(__file__).read_text().split("\n\n\n")[0]  # what is imported
        + "\n\n"
        + inspect.getsource(function)
        + "from detectron2.engine import launch\n"
        + f"if __name__ == '__main__':\n    launch({function.__name__}, 2, dist_url='auto', args=tuple(sys.argv[1:]))\n"
    )
    # Detectron2 itself trains in several processes on GPUs only.
    environment = {
        **os.environ,
        "D2_FROZEN_ENGINE": "embedded",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_frozen_is_the_same_in_both(
    flags: Callable[..., Namespace], tiny_config: Path, tmp_path: Path
) -> None:
    """The tiny config has PRETRAINED: "" and SEED 7, with which Detectron2 seeds the second process with 8."""
    _launch_two(tmp_path, _both, str(tiny_config), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    start, end = first["start"], first["end"]
    alone = FrozenTrainer(setup(flags())).model.state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in alone.items())
    assert all(torch.equal(start[name], tensor) for name, tensor in second["start"].items())
    assert all(torch.equal(end[name], tensor) for name, tensor in second["end"].items())
    frozen = [name for name in start if name.startswith("backbone.bottom_up.")]
    assert frozen and all(torch.equal(end[name], start[name]) for name in frozen)
    assert any(not torch.equal(end[name], start[name]) for name in start if name not in frozen)
    for rank, error in enumerate((first["error"], second["error"])):
        assert "frozen weights at 'backbone.bottom_up' differ between processes" in error
        assert f"(rank {rank})" in error and "MODEL.TIMM.PRETRAINED" in error


def _bad_image(config_file: str, folder: str) -> None:
    """Four iterations; then the same with an image for the second process in the third that cannot be read."""
    import os

    from d2_frozen.data.loader import DrawnDataset, SampleError

    def train(name: str, checkpoint_period: int) -> None:
        options = ["SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()", "OUTPUT_DIR", f"{folder}/{name}"]
        options += ["SOLVER.CHECKPOINT_PERIOD", str(checkpoint_period)]
        flags = argument_parser().parse_args(["--config-file", config_file, *options])
        FrozenTrainer(setup(flags)).train()

    train("whole", 2)
    mapped = DrawnDataset._mapped

    def bad(self: DrawnDataset, record: object, position: int, redraw: int) -> object:
        if position == 5:
            raise OSError("truncated")
        return mapped(self, record, position, redraw)

    DrawnDataset._mapped = bad
    try:
        train("bad", 100)
    except SampleError:
        assert comm.get_rank() == 1
        os._exit(0)
    except RuntimeError as err:
        assert "closed by peer" in str(err).lower() or "connection" in str(err).lower(), err


def test_an_image_that_is_bad_for_one_process_costs_no_training(tiny_config: Path, tmp_path: Path) -> None:
    """Only the first process saved; the other's image ended the run with nothing."""
    _launch_two(tmp_path, _bad_image, str(tiny_config), str(tmp_path))
    assert (tmp_path / "bad" / "last_checkpoint").read_text() == "model_0000001.pth"
    whole, saved = (
        torch.load(tmp_path / file, weights_only=True)
        for file in ("whole/model_0000001.pth", "bad/model_0000001.pth")
    )
    assert saved["iteration"] == 1
    assert all(torch.equal(tensor, saved["model"][name]) for name, tensor in whole["model"].items())


def _resume(folder: str) -> None:
    """Each process has an OUTPUT_DIR of its own, as on two machines without a common one."""
    from d2_frozen.engine import checkpoint

    checkpoint._SEEN_AFTER_S = (0.1,)
    own = Path(folder) / str(comm.get_rank())
    try:
        checkpoint.require_same_checkpoint(str(own))
        (own / "same").touch()
    except RuntimeError as error:
        (own / "error").write_text(str(error))


def test_processes_that_see_different_checkpoints_do_not_train_on(tmp_path: Path) -> None:
    """They began at different iterations, with different heads."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    (tmp_path / "0" / "last_checkpoint").write_text("model_0000001.pth")
    (tmp_path / "0" / "model_0000001.pth").touch()
    _launch_two(tmp_path, _resume, str(tmp_path))
    for rank in "01":
        assert "(process 0: model_0000001.pth; process 1: none)" in (tmp_path / rank / "error").read_text()
    for file in ("last_checkpoint", "model_0000001.pth"):
        shutil.copy(tmp_path / "0" / file, tmp_path / "1" / file)
    _launch_two(tmp_path, _resume, str(tmp_path))
    assert (tmp_path / "0" / "same").exists() and (tmp_path / "1" / "same").exists()


def _leave(folder: str) -> None:
    """The second process gets the signal; the first writes for a while."""
    import os
    import signal
    import time
    from types import SimpleNamespace

    from d2_frozen.engine.hooks import SaveAndLeaveOnSignal, StoppedBySignal

    first, written = comm.get_rank() == 0, Path(folder) / "written"

    def save(name: str, iteration: int) -> None:
        if first:
            time.sleep(2)
            written.touch()

    hook = SaveAndLeaveOnSignal()
    checkpointer = SimpleNamespace(save=save)
    hook.trainer = SimpleNamespace(iter=0, max_iter=9, checkpointer=checkpointer)
    hook.before_train()
    if not first:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        hook.after_step()
    except StoppedBySignal:
        (Path(folder) / f"{comm.get_rank()}_{written.exists()}").touch()


def test_no_process_leaves_while_the_first_one_saves(tmp_path: Path) -> None:
    """torch ends the others of one that has left, after half a minute by SIGKILL."""
    _launch_two(tmp_path, _leave, str(tmp_path))
    assert (tmp_path / "0_True").exists() and (tmp_path / "1_True").exists()
