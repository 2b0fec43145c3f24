"""Several heads in one run: their trainers take turns, and equal images pass the frozen backbone once.

Each head keeps its data, schedule, random draws and checkpoints; its trainer is the one that trains it alone. Shared
are the backbone's tensors, the batches of heads with the same stream of data, and with them the pass.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from d2_frozen.backbone import FrozenBackbone, PassMemory, frozen_parts, share_equal_backbones
from d2_frozen.data.loader import TrainLoader
from d2_frozen.data.own_names import OwnNames
from d2_frozen.engine.hooks import (
    ROUND_TIME,
    SaveAndLeaveOnSignal,
    SavesIfStopped,
    SignalWatch,
)
from d2_frozen.engine.trainer import FrozenTrainer
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

logger = logging.getLogger(__name__)


class JointHead:
    """One head of a joint run.

    Args:
        name: for the log.
        trainer: ready to train: built, resumed or loaded.
        names: the dataset catalogs in which it was built.
        backbone_settings: equal for heads whose backbones may be one if their weights are.
    Attributes:
        done: the last iteration that is finished.
        ended, failed: its training is over; by an error of its own.
    """

    def __init__(
        self,
        name: str,
        trainer: FrozenTrainer,
        names: OwnNames | None = None,
        backbone_settings: Hashable = (),
    ) -> None:
        self.name = name
        self.trainer = trainer
        self.names = names or OwnNames()
        self.backbone_settings = backbone_settings
        self.done = trainer.start_iter - 1
        self.begun = self.ended = self.failed = False
        # Leaving is for all heads together, after the iteration of the last.
        trainer._hooks = [hook for hook in trainer._hooks if not isinstance(hook, SaveAndLeaveOnSignal)]

    @property
    def backbones(self) -> list[FrozenBackbone]:
        return list(frozen_parts(self.trainer.model).values())

    @contextlib.contextmanager
    def turn(self) -> Iterator[FrozenTrainer]:
        """Within, catalogs, log and event storage are this head's."""
        with self.names.active(), speaking(self.name), contextlib.ExitStack() as stack:
            if self.begun:
                stack.enter_context(self.trainer.storage)
            yield self.trainer

    def begin(self) -> None:
        """What TrainerBase.train does before its loop."""
        trainer = self.trainer
        trainer.iter = trainer.start_iter
        trainer.storage = EventStorage(trainer.start_iter)
        self.begun = True
        with self.turn():
            logger.info("Starting training from iteration %d", trainer.start_iter)
            trainer.before_train()

    def step(self, iteration: int, memory: PassMemory) -> None:
        """One iteration, as TrainerBase.train has it."""
        with self.turn() as trainer:
            trainer.iter = iteration
            trainer.before_step()
            # Not around the hooks: an evaluation would fill the memory with its images.
            with memory.on(self.backbones):
                trainer.run_step()
            trainer.after_step()
        self.done = iteration

    def end(self) -> None:
        """What TrainerBase.train does after its loop, however that ended."""
        if not self.begun or self.ended:
            return
        self.ended = True
        with self.turn() as trainer:
            # Hooks tell a finished run by it, as TrainerBase has it.
            trainer.iter = self.done + 1 if self.done == trainer.max_iter - 1 else trainer.iter
            trainer.after_train()

    def save(self) -> None:
        """A checkpoint after the last finished iteration; none where nothing is new."""
        if self.ended or self.failed or not self.trainer.start_iter <= self.done < self.trainer.max_iter - 1:
            return
        with self.turn() as trainer:
            trainer.iter = self.done
            trainer.checkpointer.save(f"model_{self.done:07d}", iteration=self.done)

    def results(self) -> dict[str, Any] | None:
        """Of the last evaluation; verified where TEST.EXPECTED_RESULTS asks for it."""
        found = getattr(self.trainer, "_last_eval_results", None)
        if found and len(self.trainer.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            verify_results(self.trainer.cfg, found)
        return found


class JointTraining:
    """Trains heads together; call it once.

    In every round each head has one step of the same iteration; a head that was saved earlier than the others catches
    up first, and one with fewer iterations ends before them.

    Attributes:
        memory: counts passes of backbones, and reused ones.
    """

    def __init__(self, heads: Sequence[JointHead]) -> None:
        self.memory = PassMemory()
        self._watch = SignalWatch()
        for head in heads:
            for hook in head.trainer._hooks:
                if isinstance(hook, SavesIfStopped):
                    hook.watch, hook.save = self._watch, functools.partial(self._save_while_evaluating, head)
        models = [head.trainer.model for head in heads]
        self.backbones = share_equal_backbones(models, [head.backbone_settings for head in heads])
        unfinished = [head for head in heads if head.trainer.start_iter < head.trainer.max_iter]
        self._groups = share_streams(unfinished)
        # Heads with the same batches follow each other, so that maps need not be kept longer.
        self._heads = [head for group in self._groups for head in group]
        for line in self.describe(heads):
            logger.info(line)

    def describe(self, heads: Sequence[JointHead]) -> Iterator[str]:
        """Who shares what, in words."""
        for group in self.backbones:
            names = ", ".join(heads[i].name for i in group)
            parts = heads[group[0]].backbones
            network = parts[0].name if parts else "a network that trains"
            yield f"{names}: {'share the frozen backbone ' if len(group) > 1 else 'on '}{network}"
        for sharing in self._groups:
            if len(sharing) > 1:
                names = ", ".join(head.name for head in sharing)
                yield f"{names}: the same stream of data, so one batch and one pass per iteration"

    def __call__(self) -> dict[str, dict[str, Any] | None]:
        """Train all heads to their MAX_ITER; head name -> results of its last evaluation.

        Raises:
            StoppedBySignal, KeyboardInterrupt: after a signal, Ctrl-C; every head is saved.
            Exception: what a head raised; the others are saved first.
        """
        self._watch.start()
        try:
            for head in self._heads:
                head.begin()
            first = min((head.trainer.start_iter for head in self._heads), default=0)
            last = max((head.trainer.max_iter for head in self._heads), default=0)
            for iteration in range(first, last):
                self._round(iteration)
                self._leave_if_asked(iteration)
            return {head.name: head.results() for head in self._heads}
        except Exception:
            with contextlib.suppress(OSError):  # told; the error that ends the run is another one
                self._save_all()
            raise
        finally:
            self._watch.stop()
            for head in self._heads:
                head.end()

    def _round(self, iteration: int) -> None:
        start = time.perf_counter()
        for group in self._groups:
            for head in group:
                if head.trainer.start_iter <= iteration < head.trainer.max_iter:
                    self._step(head, iteration)
            self.memory.forget()
        seconds = time.perf_counter() - start
        for head in self._heads:
            if head.done == iteration and not head.ended:
                if iteration > head.trainer.start_iter + 2:  # the first ones are slow
                    head.trainer.storage.put_scalar(ROUND_TIME, seconds)
                if iteration == head.trainer.max_iter - 1:
                    head.end()

    def _step(self, head: JointHead, iteration: int) -> None:
        try:
            head.step(iteration, self.memory)
        except Exception:
            logger.exception("%s failed in iteration %d; the other heads are saved:", head.name, iteration)
            head.failed = True  # half a step is nothing to save
            raise

    def _save_while_evaluating(self, evaluated: JointHead) -> None:
        # Its step of this iteration is over, and so are the hooks that change what is saved.
        evaluated.done = evaluated.trainer.iter
        self._save_all()

    def _save_all(self) -> None:
        """Every head that can be; then OSError, if one could not."""
        failed: OSError | None = None
        for head in self._heads:
            try:
                head.save()
            except OSError as err:
                logger.error("%s is not saved: %s", head.name, err)
                failed = failed or err
        if failed is not None:
            raise failed

    def _leave_if_asked(self, iteration: int) -> None:
        received = self._watch.received()
        if received:
            self._watch.leave(received, self._save_all, f"all heads saved after iteration {iteration}")


# ---- streams of data


def share_streams(heads: Sequence[JointHead]) -> list[list[JointHead]]:
    """Let heads whose loaders would give the same batches read them once; groups of those that do."""
    groups: list[tuple[TrainLoader | None, list[JointHead]]] = []
    for head in heads:
        with head.turn() as trainer:
            loader: Any = trainer.stream.build(trainer.start_iter)
        trainer.stream.build = functools.partial(_built, loader)
        if not isinstance(loader, TrainLoader):
            groups.append((None, [head]))
            continue
        for other, group in groups:
            if other is not None and same_batches(other, loader):
                group.append(head)
                break
        else:
            groups.append((loader, [head]))
    for loader, group in groups:
        if loader is not None and len(group) > 1:
            start, bring = min(head.trainer.start_iter for head in group), group[0].trainer.stream.bring
            shared = _SharedBatches(loader, start, bring)
            for head in group:
                # Brought to the device once, for all; none may be ahead of the others.
                head.trainer.stream.build, head.trainer.stream.bring = shared.from_iteration, iter
    return [group for _, group in groups]


def _built(loader: Any, start: int) -> Any:
    """The loader that was made for this start already: a second one would open its feature cache again."""
    return loader


def same_batches(a: TrainLoader, b: TrainLoader) -> bool:
    """Would two loaders give equal batches at every iteration? False also where that cannot be told.

    Loaders with a feature cache each bring what their own head stored.
    """
    if a.cache is not None or b.cache is not None or _plain(_recipe(a)) != _plain(_recipe(b)):
        return False
    first, second = a.dataset.records, b.dataset.records
    try:
        return len(first) == len(second) and all(bool(x == y) for x, y in zip(first, second))
    except ValueError:  # arrays in records
        return False


def _recipe(loader: TrainLoader) -> list[Any]:
    dataset = {key: value for key, value in vars(loader.dataset).items() if key != "records"}
    return [dataset, loader.sampler, loader.batch_size, loader.wide]


def _plain(value: Any, depth: int = 12) -> Any:
    """An object as nested tuples of plain values, equal for objects that were made alike.

    An object with a method ``recipe`` says itself what of it matters.
    """
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.asarray(value)
        return "array", array.shape, str(array.dtype), array.tobytes()
    if depth == 0:
        return id(value)  # equal to nothing else
    if isinstance(value, dict):
        return tuple(sorted((str(key), _plain(inner, depth - 1)) for key, inner in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_plain(inner, depth - 1) for inner in value)
    if isinstance(value, type):
        return value.__module__, value.__qualname__
    if isinstance(value, functools.partial):
        return _plain([value.func, value.args, value.keywords], depth - 1)
    if isinstance(value, types.FunctionType):
        caught = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, _plain([caught, value.__defaults__], depth - 1)
    if isinstance(value, types.MethodType):
        return value.__qualname__, _plain(value.__self__, depth - 1)
    kind = type(value).__module__, type(value).__qualname__
    if hasattr(value, "recipe"):
        return *kind, _plain(value.recipe(), depth - 1)
    if hasattr(value, "__dict__"):
        return *kind, _plain(vars(value), depth - 1)
    return id(value)


class _SharedBatches:
    """One loader for several trainers that ask for the same iteration one after the other."""

    def __init__(
        self,
        loader: TrainLoader,
        start_iteration: int,
        bring: Callable[[Iterable[list[Any]]], Iterable[list[Any]]] = iter,
    ) -> None:
        loader.start_iteration = start_iteration
        self._loader = loader
        self._bring = bring
        self._batches: Iterator[list[Any]] | None = None
        self._at = start_iteration - 1
        self._batch: list[Any] = []

    def from_iteration(self, start: int) -> Iterator[list[Any]]:
        """Batches for one of the trainers; each gets dictionaries of its own around the same tensors."""
        for iteration in count(start):
            yield [dict(sample) for sample in self._get(iteration)]

    def _get(self, iteration: int) -> list[Any]:
        if self._batches is None:
            self._batches = iter(self._bring(self._loader))
        while self._at < iteration:
            self._batch = next(self._batches)
            self._at += 1
        assert self._at == iteration, f"batch {iteration} was asked for after batch {self._at}"
        return self._batch


# ---- the log

_speaker: str | None = None


@contextlib.contextmanager
def speaking(name: str) -> Iterator[None]:
    """Within, messages are those of the head ``name``."""
    global _speaker
    before, _speaker = _speaker, name
    try:
        yield
    finally:
        _speaker = before


class HeadLogs:
    """One terminal for all heads, with the head's name before its lines, and in each head's log.txt only its own."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._terminals: set[str] = set()

    def take(self, name: str, logger_names: Iterable[str] = ("d2_frozen", "detectron2", "fvcore")) -> None:
        """Sort the handlers that setting up the head ``name`` has added to the loggers."""
        for logger_name in logger_names:
            target = logging.getLogger(logger_name)
            for handler in [one for one in target.handlers if id(one) not in self._seen]:
                self._seen.add(id(handler))
                stream = getattr(handler, "stream", None)
                if getattr(stream, "name", "") not in ("<stdout>", "<stderr>"):
                    handler.addFilter(_Only(name))
                elif logger_name in self._terminals:
                    target.removeHandler(handler)
                else:
                    self._terminals.add(logger_name)
                    handler.setFormatter(_Named(handler.formatter or logging.Formatter()))


class _Only(logging.Filter):
    """What a head says, and what is said for all."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self._head = head

    def filter(self, record: logging.LogRecord) -> bool:
        return _speaker in (None, self._head)


class _Named(logging.Formatter):
    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        text = self._inner.format(record)
        return text if _speaker is None else f"[{_speaker}] {text}"
