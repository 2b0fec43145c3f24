"""Hooks that every task shares: repeatable draws per iteration, leaving on a signal, one line of progress."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer

from d2_frozen.data.workers import NOTICES
from d2_frozen.engine.checkpoint import save_after
from d2_frozen.files import by_the_way
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

# Seconds of one iteration of every head together, where several train (joint.py).
ROUND_TIME = "round_time"
# Iterations until a checkpoint that could not be written is tried again.
_TRY_AGAIN = 100

logger = logging.getLogger(__name__)


class StoppedBySignal(SystemExit):
    """Training left after saving; the exit code is 128 + the signal's number, as shells expect."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


class SeedEachIteration(HookBase):
    """Make what the model draws in iteration ``i`` a function of (seed, i, rank).

    So a resumed run equals an uninterrupted one without storing generator states.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        words = np.random.SeedSequence([self.seed, self.trainer.iter, comm.get_rank()]).generate_state(3)
        torch.manual_seed(int(words[0]))
        np.random.seed(int(words[1]))
        random.seed(int(words[2]))


class KeepNewestCheckpoints(HookBase):
    """Remove older periodic checkpoints (``model_0004999.pth``) of a run, those of before an interruption too.

    Must come after the hook that writes them. Those of later iterations are of another run in this folder, and stay.

    Args:
        folder: of the run.
        kept: at least 1; how many stay.
    """

    def __init__(self, folder: str, kept: int) -> None:
        if kept < 1:
            raise ValueError(f"SOLVER.CHECKPOINTS_KEPT is {kept}; give 1 or more, or 0 to keep all.")
        self.folder, self.kept = Path(folder), kept

    def after_step(self) -> None:
        newest = self.folder / f"model_{self.trainer.iter:07d}.pth"
        if comm.is_main_process() and newest.exists():
            written = sorted(self.folder.glob("model_" + "[0-9]" * 7 + ".pth"))
            with by_the_way("An older checkpoint is not removed"):
                for path in written[: written.index(newest) + 1][: -self.kept]:
                    path.unlink(missing_ok=True)


class KeepBestCheckpoint(HookBase):
    """Write ``model_best.pth`` when a metric is higher than ever in this run, before an interruption too.

    Detectron2's BestCheckpointer forgets what was before. Must come after the hooks that evaluate.

    Args:
        checkpointer: saves the model.
        metric: as metrics.json has it: ``bbox/AP``, with several test sets ``NAME/bbox/AP``.
    """

    FILE = "model_best"

    def __init__(self, checkpointer: Checkpointer, metric: str) -> None:
        self.checkpointer, self.metric = checkpointer, metric
        self._best: float | None = None
        self._resumed = False
        self._seen_at: int | None = None
        self._told = False

    def state_dict(self) -> dict[str, Any]:
        # The others have no results. One that saves for an image that it cannot read leaves it to model_best.pth.
        return {"best": {self.metric: self._best}} if comm.is_main_process() else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A checkpoint says how good its run was; model_best.pth may be of another one in this folder."""
        self._best, self._resumed = state["best"].get(self.metric), True

    def before_train(self) -> None:
        if self._resumed or self.trainer.start_iter == 0:
            return
        # Older checkpoints do not say it.
        path = Path(self.checkpointer.save_dir, f"{self.FILE}.pth")
        if path.is_file():
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                self._best = content["best_metric"].get(self.metric)
            except Exception as err:  # whatever the bytes lead to
                logger.warning("%s does not say how good it is (%s); the best starts anew.", path, err)

    def after_step(self) -> None:
        self._look(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._look(self.trainer.iter - 1)

    def _look(self, done: int) -> None:
        """``done`` is the iteration that was trained last."""
        if not comm.is_main_process():
            return
        value, evaluated_at = self.trainer.storage.latest().get(self.metric, (math.nan, None))
        if evaluated_at is None:
            self._tell_of_other_metrics()
            return
        if evaluated_at == self._seen_at:
            return
        self._seen_at = evaluated_at
        if math.isnan(value) or (self._best is not None and value <= self._best):
            return
        before, self._best = self._best, float(value)
        with by_the_way(f"{self.FILE}.pth is not written"):
            try:
                save_after(
                    self.checkpointer, self.trainer, done, self.FILE, best_metric={self.metric: self._best}
                )
            except OSError:
                self._best = before  # what is on the disk, for the next evaluation to be better than
                raise
            than = "" if before is None else f" (before: {before:.4f})"
            logger.info("%s is %.4f, the best so far%s.", self.metric, value, than)

    def _tell_of_other_metrics(self) -> None:
        results = getattr(self.trainer, "_last_eval_results", None)
        if results is not None and not self._told:
            self._told = True
            names = (
                ", ".join(flatten_results_dict(results)) or "nothing, as where the test data has no labels"
            )
            logger.error(
                "SOLVER.BEST_CHECKPOINT is %r, which the evaluation does not give: no %s.pth is written. It gives %s.",
                self.metric,
                self.FILE,
                names,
            )


class SavesWhenItCan(HookBase):
    """A hook that writes checkpoints; where one cannot be written, training goes on and tries again.

    A full disk is emptied, or a file server comes back, while what was trained is still in memory. Only the last
    checkpoint, and one that a signal asks for, raise.

    Args:
        saving: the hook.
    """

    def __init__(self, saving: HookBase) -> None:
        self.saving = saving
        self._failed_at: int | None = None

    def before_train(self) -> None:
        self.saving.trainer = self.trainer
        self.saving.before_train()

    def after_step(self) -> None:
        iteration, last = self.trainer.iter, self.trainer.iter + 1 >= self.trainer.max_iter
        try:
            if self._failed_at is None or last or (iteration - self._failed_at) % _TRY_AGAIN:
                self.saving.after_step()
            else:
                self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
                self._failed_at = None
        except OSError as err:
            if last:
                raise
            self._failed_at = iteration
            logger.error(
                "No checkpoint after iteration %d: %s. Training goes on, and tries again in %d iterations; what was "
                "trained since the last checkpoint is in memory only. Make room: SOLVER.CHECKPOINTS_KEPT keeps fewer.",
                iteration,
                err,
                _TRY_AGAIN,
            )

    def after_train(self) -> None:
        self.saving.after_train()


class WritesWhenItCan(EventWriter):
    """A writer of metrics; where its file cannot be written, that is said once, and training goes on.

    Args:
        writer: it gets what came meanwhile when it can be written again, as far as it remembers.
    """

    def __init__(self, writer: EventWriter) -> None:
        self.writer = writer
        self._told = False

    def write(self) -> None:
        self._try(self.writer.write)

    def close(self) -> None:
        self._try(self.writer.close)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as err:
            if not self._told:
                logger.error(
                    "%s cannot write: %s. Training goes on without.", type(self.writer).__name__, err
                )
            self._told = True
        else:
            self._told = False


class SignalWatch:
    """Between ``start`` and ``stop``, signals are noted instead of ending the process.

    Python lets the main thread alone do that: a training in another one is left to whoever started it.

    Who had a handler of its own for one (submitit, which asks its cluster for a successor; Python, which raises
    KeyboardInterrupt on Ctrl-C) gets it after the saving, and decides what happens then. A second Ctrl-C ends at once.

    Args:
        signals: those of clusters, and Ctrl-C.
    Attributes:
        leaving: a signal ends the training.
    """

    def __init__(self, signals: tuple[int, ...] = (*NOTICES, signal.SIGINT)) -> None:
        self.signals = signals
        self.leaving = False
        self._at_once: Callable[[], None] | None = None
        self._saving = False
        self._received: list[int] = []
        self._before: dict[int, Any] = {}

    def start(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.signals:
            # None: somebody's in C, which could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._receive)

    def stop(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def received(self) -> int:
        """The signal's number, 0 for none. All ranks must ask; they get the same answer, whichever was signalled."""
        own = self._received[0] if self._received else 0
        return max(comm.all_gather(own)) if comm.get_world_size() > 1 else own

    def leave(self, number: int, save: Callable[[], None], saved: str) -> None:
        """Save; then who had handlers for the signals decides, if all of them had one. All ranks must call it.

        Args:
            number: what :meth:`received` gave.
            saved: what then is, in words.
        Raises:
            StoppedBySignal, KeyboardInterrupt: the end of this process.
        """
        self.leaving = True
        save()
        # Who leaves first has the others killed half a minute later, a first process too that still writes.
        comm.synchronize()
        logger.warning("%s: %s; continue with --resume.", signal.Signals(number).name, saved)
        numbers, self._received = self._received, []
        handlers = [(one, self._before.get(one)) for one in numbers]
        for one, handler in handlers:
            if callable(handler):
                handler(one, None)
        if not handlers or not all(callable(handler) for _, handler in handlers):
            raise StoppedBySignal(number)
        self.leaving = False

    @contextlib.contextmanager
    def saving_at_once(self, save: Callable[[], None]) -> Iterator[None]:
        """Within, ``save`` is called as a signal comes, in the middle of whatever is done then."""
        self._at_once = save
        try:
            yield
        finally:
            self._at_once = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        again = bool(self._received)
        if number not in self._received:
            self._received.append(number)
        name, before = signal.Signals(number).name, self._before.get(number)
        if self._at_once is None:
            advice = " A second Ctrl-C ends at once." if number == signal.SIGINT else ""
            logger.warning("%s received: saving after this iteration.%s", name, advice)
            return
        if not again:
            leaving = "" if callable(before) else ", and leaving after this evaluation"
            logger.warning("%s received: saving now%s.", name, leaving)
            self._saving = True
            try:
                self._at_once()
            finally:
                self._saving = False
        if self._saving:
            return  # a signal while another one has it save, which comes back to this one then
        for one in list(self._received):
            if callable(handler := self._before.get(one)):
                self._received.remove(one)
                handler(one, frame)


class SavesIfStopped(HookBase):
    """A hook that evaluates, which may fail, or take longer than a cluster waits: an error and a signal save at once.

    Args:
        evaluation: the hook.
        watch: notes the signal.
        save: what has been trained.
    """

    def __init__(self, evaluation: HookBase, watch: SignalWatch, save: Callable[[], None]) -> None:
        self.evaluation, self.watch, self.save = evaluation, watch, save

    def before_train(self) -> None:
        self.evaluation.trainer = self.trainer
        self.evaluation.before_train()

    def after_step(self) -> None:
        try:
            with self.watch.saving_at_once(self.save):
                self.evaluation.after_step()
        except Exception:
            logger.error(
                "The evaluation failed. What was trained is saved before the end: --resume goes on from there."
            )
            with by_the_way("It could not be saved"):
                self.save()
            raise

    def after_train(self) -> None:
        if not self.watch.leaving:  # else the last iteration was done, and it would begin now
            self.evaluation.after_train()


class SaveAndLeaveOnSignal(HookBase):
    """On a signal of a cluster and on Ctrl-C finish the iteration, save, and leave; ``--resume`` goes on from there.

    Must come after the hooks that change saved state (learning-rate scheduler), and before those that evaluate: a
    cluster does not wait for an evaluation.
    """

    def __init__(self) -> None:
        self._watch = SignalWatch()

    def saving_during(self, evaluation: HookBase) -> HookBase:
        """The hook, during which a signal saves at once."""
        return SavesIfStopped(evaluation, self._watch, self._save)

    def _save(self) -> None:
        done = self.trainer.iter
        if done + 1 < self.trainer.max_iter:  # else the final checkpoint has just been written
            self.trainer.checkpointer.save(f"model_{done:07d}", iteration=done)

    def before_train(self) -> None:
        self._watch.start()

    def after_train(self) -> None:
        self._watch.stop()

    def after_step(self) -> None:
        received = self._watch.received()
        done = self.trainer.iter
        if received:
            self._watch.leave(received, self._save, f"saved after iteration {done}")
        elif done + 1 >= self.trainer.max_iter:
            self._watch.stop()  # all is saved; the last evaluation need not be waited for


class ProgressPrinter(EventWriter):
    """One log line per period: time left, iteration, losses, seconds, images/s, learning rate, memory.

    Args:
        max_iter: length of the run, for the estimate of the time left.
        images_per_iteration: over all ranks.
        window_size: iterations over which losses and times are smoothed (median).
    """

    def __init__(self, max_iter: int, images_per_iteration: int, window_size: int = 20) -> None:
        self.logger = logging.getLogger("detectron2.utils.events")
        self.max_iter = max_iter
        self.images_per_iteration = images_per_iteration
        self.window_size = window_size

    def write(self) -> None:
        storage = get_event_storage()
        iteration = storage.iter
        if iteration == self.max_iter:
            return  # after the last step there is nothing new to tell
        histories = storage.histories()
        fields = [f"eta: {self._time_left(iteration, histories)}", f"iter: {iteration}"]
        fields += [
            f"{name}: {history.median(self._smoothing(storage, name)):.4g}"
            for name, history in histories.items()
            if "loss" in name
        ]
        if "time" in histories:
            seconds = histories["time"].median(self._smoothing(storage, "time"))
            fields.append(f"time: {seconds:.4f}")
            fields.append(f"images/s: {self.images_per_iteration / max(seconds, 1e-9):.1f}")
        if "data_time" in histories:
            fields.append(
                f"data_time: {histories['data_time'].median(self._smoothing(storage, 'data_time')):.4f}"
            )
        if "lr" in histories:
            fields.append(f"lr: {histories['lr'].latest():.5g}")
        fields.append(f"max_mem: {peak_memory_mib():.0f}M")
        self.logger.info("  ".join(fields))

    def _smoothing(self, storage: object, name: str) -> int:
        return min(self.window_size, len(storage.history(name).values()))  # type: ignore[attr-defined]

    def _time_left(self, iteration: int, histories: dict) -> str:
        # In joint training, the time of all heads' steps.
        of_iteration = next((histories[name] for name in (ROUND_TIME, "time") if name in histories), None)
        if of_iteration is None:  # Detectron2's timer leaves the first iterations out
            return "unknown"
        left = of_iteration.global_avg() * max(self.max_iter - iteration - 1, 0)
        get_event_storage().put_scalar("eta_seconds", left, smoothing_hint=False)
        return str(datetime.timedelta(seconds=int(left)))


def peak_memory_mib() -> float:
    """Largest memory so far in MiB: of the GPU where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        # Not getrusage: what it calls the peak of a process starts at that of the process which launched it.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
