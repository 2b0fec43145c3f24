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


def _stopped(config: Path, out: Path, options: list[str], stop: Callable[[subprocess.Popen], None]) -> int:
    """Begin a training without end, stop it when it has written metrics, wait for all its processes; the exit code."""
    # Detectron2 itself trains in several processes on GPUs only.
    environment = {**os.environ, "D2_FROZEN_ENGINE": "embedded", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment["PYTHONFAULTHANDLER"] = "1"  # where it stood, if it does not end
    command = [sys.executable, "-m", "d2_frozen.train_net", "--config-file", str(config), *options]
    command += ["SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "100000", "DATASETS.TEST", "()"]
    with open(out.with_suffix(".txt"), "wb") as output:
        run = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    metrics = out / "metrics.json"
    try:
        _until(lambda: metrics.exists() and metrics.stat().st_size > 0, "metrics")
        stop(run)
        try:
            code = run.wait(60)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGABRT)
            run.wait(60)
            raise AssertionError(f"it did not end:\n{out.with_suffix('.txt').read_text()[-8000:]}") from None
        _until(lambda: _is_empty(run.pid), "end of the other processes", 60)
    finally:
        if not _is_empty(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
    return code


def _assert_saved(out: Path) -> None:
    name = (out / "last_checkpoint").read_text()
    assert torch.load(out / name, weights_only=True)["iteration"] == int(name[6:-4])
    assert "continue with --resume" in (out / "log.txt").read_text()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGINT, 130)]
)
def test_stopping_the_parent_saves_and_leaves_no_process(
    tiny_config: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    def stop(run: subprocess.Popen) -> None:
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # as a terminal does
        else:
            run.send_signal(number)

    options = ["--num-gpus", "2", "--dist-url", "auto"]
    assert _stopped(tiny_config, tmp_path / "out", options, stop) == code
    _assert_saved(tmp_path / "out")


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs to know who sends a signal")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129), (signal.SIGINT, 130)],
)
def test_a_notice_to_all_processes_of_a_job_does_not_end_its_workers(
    tiny_config: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Slurm's way. The loader's workers ended before the iteration did, and all since the last checkpoint was lost."""
    with_workers = tmp_path / "with_workers.yaml"
    with_workers.write_text(f"_BASE_: {tiny_config}\nDATALOADER: {{NUM_WORKERS: 2}}\n")
    assert _stopped(with_workers, tmp_path / "out", [], lambda run: os.killpg(run.pid, number)) == code
    _assert_saved(tmp_path / "out")
    assert "Traceback" not in (tmp_path / "out.txt").read_text()


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
