"""Who stops the process that was started, stops the run in all its processes, after saving."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2_frozen import processes
from d2_frozen.train_net import argument_parser

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPU")


def _until(condition: Callable[[], bool], what: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} after {seconds} s"
        time.sleep(0.2)


def _is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopping_the_parent_saves_and_leaves_no_process(
    tiny_config: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    # Detectron2 itself trains in several processes on GPUs only.
    environment = {**os.environ, "D2_FROZEN_ENGINE": "embedded", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "d2_frozen.train_net", "--num-gpus", "2", "--dist-url", "auto"]
    command += ["--config-file", str(tiny_config), "SOLVER.MAX_ITER", "100000", "DATASETS.TEST", "()"]
    with open(tmp_path / "output.txt", "wb") as output:
        run = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _until(lambda: (out / "metrics.json").exists(), "metrics.json")
        run.send_signal(number)
        assert run.wait(60) == code
        _until(lambda: _is_empty(run.pid), "end of the other processes", 60)
    finally:
        if not _is_empty(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
    name = (out / "last_checkpoint").read_text()
    assert torch.load(out / name, weights_only=True)["iteration"] == int(name[6:-4])
    assert "continue with --resume" in (out / "log.txt").read_text()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs to know who sends a signal")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_a_notice_to_all_processes_of_a_job_does_not_end_its_workers(
    tiny_config: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Slurm's way. The loader's workers ended before the iteration did, and all since the last checkpoint was lost."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "d2_frozen.train_net", "--config-file", str(tiny_config)]
    command += ["SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "100000", "DATASETS.TEST", "()"]
    with open(tmp_path / "output.txt", "wb") as output:
        run = subprocess.Popen(
            [*command, "DATALOADER.NUM_WORKERS", "2"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _until(
            lambda: (out / "metrics.json").exists() and (out / "metrics.json").stat().st_size > 0, "metrics"
        )
        os.killpg(run.pid, number)
        assert run.wait(60) == code
        _until(lambda: _is_empty(run.pid), "end of the other processes", 60)
    finally:
        if not _is_empty(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
    name = (out / "last_checkpoint").read_text()
    assert torch.load(out / name, weights_only=True)["iteration"] == int(name[6:-4])
    assert "continue with --resume" in (out / "log.txt").read_text()


def test_a_second_run_of_a_user_on_one_machine_meets_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first process could not listen where the first run does, and its others would have met those of that one."""
    asked: list[str] = []
    monkeypatch.setattr(processes, "launch", lambda *_, dist_url, **__: asked.append(dist_url))
    args = argument_parser().parse_args(["--num-gpus", "2"])
    port = int(args.dist_url.rpartition(":")[2])
    processes.run_processes(print, args)
    with socket.socket() as first:
        first.bind(("127.0.0.1", port))
        first.listen()
        processes.run_processes(print, args)
        chosen = argument_parser().parse_args(["--num-gpus", "2", "--dist-url", f"tcp://localhost:{port}"])
        processes.run_processes(print, chosen)
        args.num_machines = 2
        processes.run_processes(print, args)
    assert asked == [args.dist_url, "auto", f"tcp://localhost:{port}", args.dist_url]
