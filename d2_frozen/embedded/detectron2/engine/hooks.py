"""Ready-made hooks: timing, writing, checkpoints, learning rate, evaluation, precise BN, profiling."""

from __future__ import annotations

import datetime
import logging
import math
import operator
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicSaving
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from detectron2.utils.file_io import PathManager

from .train_loop import HookBase, TrainerBase

__all__ = [
    "AutogradProfiler",
    "BestCheckpointer",
    "CallbackHook",
    "EvalHook",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "TorchMemoryStats",
    "TorchProfiler",
]

_Predicate = Callable[[TrainerBase], bool]

# What a profile holds beside times.
_RECORDED: dict[str, Any] = dict.fromkeys(
    ("record_shapes", "profile_memory", "with_stack", "with_flops"), True
)


class CallbackHook(HookBase):
    """A hook from functions; each is called with the trainer."""

    def __init__(
        self,
        *,
        before_train: Callable[[TrainerBase], None] | None = None,
        after_train: Callable[[TrainerBase], None] | None = None,
        before_step: Callable[[TrainerBase], None] | None = None,
        after_step: Callable[[TrainerBase], None] | None = None,
    ) -> None:
        self._callbacks = {
            "before_train": before_train,
            "after_train": after_train,
            "before_step": before_step,
            "after_step": after_step,
        }

    def _call(self, moment: str) -> None:
        function = self._callbacks.get(moment)
        if function is not None:
            function(self.trainer)

    def before_train(self) -> None:
        self._call("before_train")

    def before_step(self) -> None:
        self._call("before_step")

    def after_step(self) -> None:
        self._call("after_step")

    def after_train(self) -> None:
        self._call("after_train")
        # They may close over the trainer, which would keep it alive.
        self._callbacks.clear()


class IterationTimer(HookBase):
    """Puts the seconds of each iteration into the storage as ``time``, and logs totals at the end.

    Args:
        warmup_iter: iterations at the start that do not count.
    """

    def __init__(self, warmup_iter: int = 3) -> None:
        self._warmup_iter = warmup_iter
        self._step_timer = Timer()
        self._in_steps = Timer()
        self._start_time = time.perf_counter()

    def before_train(self) -> None:
        self._restart()

    def before_step(self) -> None:
        self._step_timer.reset()
        self._in_steps.resume()

    def after_step(self) -> None:
        if self._iterations_done() >= self._warmup_iter:
            self.trainer.storage.put_scalars(time=self._step_timer.seconds())
            self._in_steps.pause()
        else:
            self._restart()

    def after_train(self) -> None:
        total = time.perf_counter() - self._start_time
        in_steps = self._in_steps.seconds()
        # storage.iter is max_iter here, and the warm-up does not count.
        counted = self.trainer.storage.iter - self.trainer.start_iter - max(self._warmup_iter - 1, 0)
        log = logging.getLogger(__name__)
        if counted > 0 and in_steps > 0:
            log.info(
                "Overall training speed: %d iterations in %s (%.4f s / it)",
                counted,
                _as_time(in_steps),
                in_steps / counted,
            )
        log.info("Total training time: %s (%s on hooks)", _as_time(total), _as_time(total - in_steps))

    def _iterations_done(self) -> int:
        return self.trainer.storage.iter - self.trainer.start_iter + 1

    def _restart(self) -> None:
        self._start_time = time.perf_counter()
        self._in_steps.reset()
        self._in_steps.pause()


def _as_time(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=int(max(seconds, 0)))


class PeriodicWriter(HookBase):
    """Lets writers write every ``period`` iterations and after the last one, and closes them at the end.

    Raises:
        TypeError: one of ``writers`` is no EventWriter.
    """

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(f"writers must be EventWriters, got {type(writer).__name__}.")
        self._writers = list(writers)
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            self._write()

    def after_train(self) -> None:
        # What hooks before this one put after the last step, such as the results of an evaluation.
        self._write()
        for writer in self._writers:
            writer.close()

    def _write(self) -> None:
        for writer in self._writers:
            writer.write()


class PeriodicCheckpointer(_PeriodicSaving, HookBase):
    """fvcore's PeriodicCheckpointer as a hook: ``model_0004999.pth`` etc., ``model_final.pth``."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class BestCheckpointer(HookBase):
    """Saves ``model_best.pth`` whenever a metric is better than ever. Register it after the EvalHook.

    A resumed run goes on from the best value that is noted in that file.

    Args:
        eval_period: that of the EvalHook.
        checkpointer: saves the model.
        val_metric: name in the event storage, e.g. ``bbox/AP50``.
        mode: "max" or "min".
        file_prefix: name of the file, without ".pth".
    Raises:
        ValueError: another ``mode``.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"BestCheckpointer's mode is 'max' or 'min', got {mode!r}.")
        self._logger = logging.getLogger(__name__)
        self._val_metric, self._period = val_metric, eval_period
        self._is_better = operator.gt if mode == "max" else operator.lt
        self._checkpointer = checkpointer
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def before_train(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if self.trainer.start_iter == 0 or not PathManager.isfile(path):
            return
        try:
            content = torch.load(PathManager.get_local_path(path), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as err:
            self._logger.warning(
                "%s cannot be read (%s): the best %s starts anew.", path, err, self._val_metric
            )
            return
        noted = content.get("best_metric", {}) if isinstance(content, dict) else {}
        if self._val_metric in noted:
            self.best_metric, self.best_iter = noted[self._val_metric], content.get("iteration")

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # The last iteration's evaluation comes in after_train.
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._check()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._check()

    def _check(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            self._logger.warning(
                "No %s in the event storage, no best model is kept: is an EvalHook registered before this?",
                self._val_metric,
            )
            return
        value, iteration = latest
        if not math.isfinite(value) or (
            self.best_metric is not None and not self._is_better(value, self.best_metric)
        ):
            self._logger.info(
                "Not saved as best: %s is %.5f; the best was %s in iteration %s.",
                self._val_metric,
                value,
                self.best_metric,
                self.best_iter,
            )
            return
        self._logger.info(
            "Best %s so far: %.5f in iteration %d (before: %s in iteration %s).",
            self._val_metric,
            value,
            iteration,
            self.best_metric,
            self.best_iter,
        )
        self.best_metric, self.best_iter = value, iteration
        self._checkpointer.save(self._file_prefix, iteration=iteration, best_metric={self._val_metric: value})


class LRScheduler(HookBase):
    """Steps a learning-rate scheduler after each iteration and puts ``lr`` into the storage.

    Args:
        optimizer: by default the trainer's.
        scheduler: of torch, or fvcore's ``ParamScheduler`` (a multiplier of the initial rates); by default
            the trainer's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | ParamScheduler | None = None,
    ) -> None:
        self._optimizer: Any = optimizer
        self._scheduler: Any = scheduler

    def before_train(self) -> None:
        trainer: Any = self.trainer
        self._optimizer = self._optimizer or trainer.optimizer
        if isinstance(self.scheduler, ParamScheduler):
            self._scheduler = LRMultiplier(
                self._optimizer, self.scheduler, self.trainer.max_iter, last_iter=self.trainer.iter - 1
            )
        self._shown_group = LRScheduler.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """Which group's rate stands for all: the largest; with one tensor each, one of the commonest rate."""
        groups = optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        rate = self._optimizer.param_groups[self._shown_group]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()

    @property
    def scheduler(self) -> Any:
        trainer: Any = self.trainer
        return self._scheduler or trainer.scheduler

    def state_dict(self) -> dict[str, Any]:
        # A ParamScheduler is a function of progress: it has no state until before_train wraps it.
        scheduler = self.scheduler
        return scheduler.state_dict() if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.LRScheduler):
            logging.getLogger(__name__).info("The learning-rate scheduler continues from the checkpoint.")
            self.scheduler.load_state_dict(dict(state_dict))


class EvalHook(HookBase):
    """Evaluates every ``eval_period`` iterations and after the last one; results go into the event storage.

    Args:
        eval_period: 0 for only at the end.
        eval_function: no arguments; returns a nested dict of numbers, or None.
        eval_after_train: evaluate after the last iteration too (once, if that is a multiple of the period).
    """

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], Mapping[str, Any] | None],
        eval_after_train: bool = True,
    ) -> None:
        self._period = eval_period
        self._func: Callable[[], Mapping[str, Any] | None] | None = eval_function
        self._eval_after_train = eval_after_train

    def _do_eval(self) -> None:
        assert self._func is not None, "EvalHook is used after training"
        results = self._func()
        if results:
            self.trainer.storage.put_scalars(**_numbers(results), smoothing_hint=False)
        # The others wait while rank 0 evaluates alone; without this, their next iteration's timing would be
        # off.
        comm.synchronize()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._do_eval()

    def after_train(self) -> None:
        # Not after a run that was cut short.
        if self._eval_after_train and self.trainer.iter + 1 >= self.trainer.max_iter:
            self._do_eval()
        self._func = None  # usually closes over the trainer


def _numbers(results: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(results, Mapping):
        raise TypeError(f"eval_function must return a dict, got {type(results).__name__}: {results!r}")
    numbers = {}
    for name, value in flatten_results_dict(results).items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError) as err:
            raise ValueError(
                f"eval_function must return a nested dict of numbers, but {name} is {value!r}."
            ) from err
    return numbers


class PreciseBN(HookBase):
    """Recomputes the running statistics of BatchNorm over some batches, before they are used for evaluation.

    Method: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3.

    Args:
        period: every so many iterations (0: never), and after the last one.
        model: only its BatchNorm layers in training mode are touched.
        data_loader: gives batches for the model.
        num_iter: batches to average over.
    """

    def __init__(self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iter: int) -> None:
        self._logger = logging.getLogger(__name__)
        self._period = period
        self._num_iter = num_iter
        self._data_loader = data_loader
        self._batches: Iterator[Any] | None = None
        self._disabled = not get_bn_modules(model)
        if self._disabled:
            self._logger.info("PreciseBN has nothing to do: no BatchNorm layer is in training mode.")
        self._model = model

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0):
            self.update_stats()

    def update_stats(self) -> None:
        """Do it now."""
        if self._disabled:
            return
        if self._batches is None:
            self._batches = iter(self._data_loader)
        self._logger.info("PreciseBN: statistics over %d batches.", self._num_iter)
        # The model puts its losses into the open storage; these here belong to no iteration.
        with EventStorage():
            update_bn_stats(self._model, self._batches, self._num_iter)


class TorchProfiler(HookBase):
    """Profiles the iterations for which ``enable_predicate(trainer)`` is true with ``torch.profiler``.

    Args:
        output_dir: traces go to ``output_dir/log`` (TensorBoard's profile plugin), or to ``output_dir`` as
            ``profiler-trace-iterN.json`` for chrome://tracing.
        activities: as in ``torch.profiler.profile``; by default CPU, and CUDA where there is one.
        save_tensorboard: which of the two.
    """

    def __init__(
        self,
        enable_predicate: _Predicate,
        output_dir: str,
        *,
        activities: Iterable[torch.profiler.ProfilerActivity] | None = None,
        save_tensorboard: bool = True,
    ) -> None:
        self._enable_predicate = enable_predicate
        self._output_dir = output_dir
        self._activities = activities
        self._save_tensorboard = save_tensorboard
        self._profiler: torch.profiler.profile | None = None

    def before_step(self) -> None:
        if not self._enable_predicate(self.trainer):
            return
        on_ready = None
        if self._save_tensorboard:
            on_ready = torch.profiler.tensorboard_trace_handler(
                os.path.join(self._output_dir, "log", f"profiler-tensorboard-iter{self.trainer.iter}"),
                f"worker{comm.get_rank()}",
            )
        self._profiler = torch.profiler.profile(
            activities=self._activities, on_trace_ready=on_ready, **_RECORDED
        )
        self._profiler.__enter__()

    def after_step(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.__exit__(None, None, None)
        if not self._save_tensorboard:
            PathManager.mkdirs(self._output_dir)
            path = os.path.join(self._output_dir, f"profiler-trace-iter{self.trainer.iter}.json")
            profiler.export_chrome_trace(path)


class AutogradProfiler(TorchProfiler):
    """The older profiler's interface; writes ``profiler-trace-iterN.json`` for chrome://tracing.

    Args:
        use_cuda: record CUDA kernels too.
    """

    def __init__(self, enable_predicate: _Predicate, output_dir: str, *, use_cuda: bool = True) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if use_cuda and torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        super().__init__(enable_predicate, output_dir, activities=kinds, save_tensorboard=False)


class TorchMemoryStats(HookBase):
    """Logs reserved and allocated GPU memory; does nothing without CUDA.

    Args:
        period: every so many iterations, and after the last one.
        max_runs: so many times at most.
    """

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        self._period = period
        self._runs_left = max_runs

    def after_step(self) -> None:
        if not torch.cuda.is_available() or self._runs_left <= 0:
            return
        done = self.trainer.iter + 1
        if done % self._period and done != self.trainer.max_iter:
            return
        self._runs_left -= 1
        mib = {
            "reserved": torch.cuda.memory_reserved(),
            "reserved at most": torch.cuda.max_memory_reserved(),
            "allocated": torch.cuda.memory_allocated(),
            "allocated at most": torch.cuda.max_memory_allocated(),
        }
        logging.getLogger(__name__).info(
            "GPU memory after iteration %d, MiB: %s\n%s",
            self.trainer.iter,
            ", ".join(f"{what} {amount / 2**20:.0f}" for what, amount in mib.items()),
            torch.cuda.memory_summary(),
        )
        torch.cuda.reset_peak_memory_stats()
