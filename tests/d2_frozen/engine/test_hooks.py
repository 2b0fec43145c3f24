"""What the progress line tells, what a signal does, and which model is the best."""

import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from d2_frozen.engine.hooks import (
    KeepBestCheckpoint,
    SaveAndLeaveOnSignal,
    SignalWatch,
    StoppedBySignal,
    WritesWhenItCan,
    peak_memory_mib,
)
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter


def test_peak_memory_is_that_of_this_process_not_of_its_parent() -> None:
    """A child of a process that holds 2 GiB has not used 2 GiB itself."""
    held = np.ones(2**31, np.uint8)
    code = "from d2_frozen.engine.hooks import peak_memory_mib; print(peak_memory_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    child = float(done.stdout.split()[-1])
    assert 0 < child < held.nbytes / 2**20 < peak_memory_mib()


def test_a_signal_is_waited_with_up_to_the_last_iteration_only() -> None:
    """Then all is saved, and an evaluation that takes an hour would keep a cluster's notice waiting."""
    before = signal.getsignal(signal.SIGTERM)
    hook = SaveAndLeaveOnSignal()
    saved: list[str] = []
    checkpointer = SimpleNamespace(save=lambda name, iteration: saved.append(name))
    hook.trainer = SimpleNamespace(iter=0, max_iter=2, checkpointer=checkpointer)
    hook.before_train()
    try:
        hook.after_step()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedBySignal):
            hook.after_step()
        assert saved == ["model_0000000"]
        hook._watch._received.clear()
        hook.trainer.iter = 1
        hook.after_step()
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        hook.after_train()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_metrics_that_cannot_be_written_are_told_once_and_end_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    writer = WritesWhenItCan(JSONWriter("/dev/full"))
    with EventStorage(0) as storage:
        for iteration in range(3):
            storage.iter = iteration
            storage.put_scalar("loss", 1.0)
            writer.write()
    writer.close()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["JSONWriter cannot write: [Errno 28] No space left on device. Training goes on without."]


def test_who_had_a_handler_before_decides_after_the_saving() -> None:
    """submitit asks its cluster for a successor on SIGUSR2, and does not want to end on SIGTERM."""
    done: list[str] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    for number in before:
        signal.signal(number, lambda number, frame: done.append(signal.Signals(number).name))
    hook = SaveAndLeaveOnSignal()
    checkpointer = SimpleNamespace(save=lambda name, iteration: done.append(name))
    hook.trainer = SimpleNamespace(iter=0, max_iter=9, checkpointer=checkpointer)
    hook.before_train()
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        hook.after_step()
        assert done == ["model_0000000", "SIGUSR2", "SIGTERM"]
        # In an evaluation, which may take longer than the cluster waits, at once.
        with hook._watch.saving_at_once(hook._save):
            os.kill(os.getpid(), signal.SIGUSR2)
            assert done[3:] == ["model_0000000", "SIGUSR2"]
        hook.after_step()
        assert len(done) == 5
        # Nobody had one for SIGUSR1.
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StoppedBySignal):
            hook.after_step()
    finally:
        hook.after_train()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_saves_and_a_second_one_ends_at_once() -> None:
    saved: list[str] = []
    hook = SaveAndLeaveOnSignal()
    checkpointer = SimpleNamespace(save=lambda name, iteration: saved.append(name))
    hook.trainer = SimpleNamespace(iter=0, max_iter=9, checkpointer=checkpointer)
    hook.before_train()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert not saved
        with pytest.raises(KeyboardInterrupt):
            hook.after_step()
        assert saved == ["model_0000000"]
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert len(saved) == 1
    finally:
        hook.after_train()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_a_signal_has_an_evaluation_save_ends_when_that_is_written() -> None:
    """A terminal and a process that was told by it may both tell another one."""
    done: list[str] = []

    def save() -> None:
        done.append("begun")
        os.kill(os.getpid(), signal.SIGINT)
        done.append("whole")

    watch = SignalWatch()
    watch.start()
    try:
        with watch.saving_at_once(save), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert done == ["begun", "whole"]
    finally:
        watch.stop()


def test_a_best_checkpoint_that_cannot_be_written_is_not_the_best() -> None:
    """AP is 40, 30, 20, and the disk is full at the first. What came then was not good enough to be written."""
    written = []

    def save(name: str, iteration: int, best_metric: dict[str, float]) -> None:
        if iteration == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append((name, iteration, best_metric))

    hook = KeepBestCheckpoint(SimpleNamespace(save=save), "bbox/AP")
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(iter=0, storage=storage)
        for iteration, ap in enumerate((40.0, 30.0, 20.0)):
            hook.trainer.iter = storage.iter = iteration
            storage.put_scalar("bbox/AP", ap)
            hook.after_step()
    assert written == [("model_best", 1, {"bbox/AP": 30.0})]
    assert hook.state_dict() == {"best": {"bbox/AP": 30.0}}


def test_a_process_without_results_does_not_say_what_the_best_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves for an image that it alone cannot read. Resumed from there, any evaluation was the best so far."""
    hook = KeepBestCheckpoint(SimpleNamespace(save_dir=""), "bbox/AP")
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert hook.state_dict() == {}
