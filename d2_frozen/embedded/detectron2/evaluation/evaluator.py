"""How a model is run over a dataset and measured.

In: a model, a loader of batches (lists of dicts), an evaluator.  Out: the evaluator's nested dict of metrics.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from detectron2.utils.comm import get_world_size, is_main_process

__all__ = ["DatasetEvaluator", "DatasetEvaluators", "inference_context", "inference_on_dataset"]

_WARM_UP_BATCHES = 5  # left out of the timing: allocation, kernel selection, loader start
_SECONDS_BETWEEN_REPORTS = 5.0


class DatasetEvaluator:
    """Base class: collects (input, output) pairs and turns them into metrics.

    :func:`inference_on_dataset` calls ``reset`` once, ``process`` per batch, ``evaluate`` once.
    """

    def reset(self) -> None:
        """Forget what was processed so far."""

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: what the model was given, one dict per image.
            outputs: what it returned, in the same order.
        """

    def evaluate(self) -> Mapping[str, Any] | None:
        """Compute the metrics after the last batch.

        Returns:
            {task: {metric: value}} on the main process, anything that is falsy elsewhere. None when there is
            nothing to report.
        """


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one; their results are merged.

    Raises (in ``evaluate``):
        ValueError: two of them report the same task.
    """

    def __init__(self, evaluators: Iterable[DatasetEvaluator]) -> None:
        super().__init__()
        self._evaluators = list(evaluators)

    def reset(self) -> None:
        for member in self._evaluators:
            member.reset()

    def process(self, inputs, outputs) -> None:
        for member in self._evaluators:
            member.process(inputs, outputs)

    def evaluate(self) -> OrderedDict[str, Any]:
        merged: OrderedDict[str, Any] = OrderedDict()
        for member in self._evaluators:
            part = member.evaluate()  # on every process: evaluators communicate in here
            if part is None or not is_main_process():
                continue
            for task, metrics in part.items():
                if task in merged:
                    raise ValueError(
                        f"two evaluators report the task {task!r} (the second is {type(member).__name__}); "
                        "let one of them use another name."
                    )
                merged[task] = metrics
        return merged


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside; afterwards each module has the mode it had, frozen submodules included."""
    before = {module: module.training for module in model.modules()}
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for module, mode in before.items():
            if module.training != mode:
                module.training = mode


def inference_on_dataset(
    model: Callable[[Any], Any],
    data_loader: Iterable[Sequence[Mapping[str, Any]]],
    evaluator: DatasetEvaluator | Sequence[DatasetEvaluator] | None,
    callbacks: Mapping[str, Callable[[], None]] | None = None,
) -> Mapping[str, Any]:
    """Run ``model`` over ``data_loader`` without gradients, in eval mode, and evaluate.

    Args:
        model: called with each batch. A ``nn.Module`` is put into eval mode and back; anything else is called
            as it is.
        data_loader: batches; must have a length.
        evaluator: one, several, or None to run the model only (a speed test).
        callbacks: functions to call at ``on_start``, ``before_inference``, ``after_inference`` (both around
            every batch) and ``on_end``.
    Returns:
        The evaluator's results; an empty dict where it returns None.
    """
    log = logging.getLogger(__name__)
    if evaluator is None:
        evaluator = DatasetEvaluators([])
    elif not isinstance(evaluator, DatasetEvaluator) and isinstance(evaluator, Sequence):
        evaluator = DatasetEvaluators(evaluator)
    on = dict(callbacks or {})

    def fire(moment: str) -> None:
        if moment in on:
            on[moment]()

    total = len(data_loader)  # type: ignore[arg-type]
    log.info("Start inference on %d batches", total)
    evaluator.reset()
    clock = _Stopwatch(total, log)
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        fire("on_start")
        for inputs in clock.watch(data_loader):
            fire("before_inference")
            outputs = model(inputs)
            fire("after_inference")
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.inference_done()
            evaluator.process(inputs, outputs)
        fire("on_end")
    clock.summarize()
    results = evaluator.evaluate()
    return {} if results is None else results


class _Stopwatch:
    """Splits the time per batch into data, inference and evaluation, and reports progress with an ETA."""

    def __init__(self, total: int, log: logging.Logger) -> None:
        self._total = total
        self._log = log
        self._warm_up = min(_WARM_UP_BATCHES, max(total - 1, 0))
        self._seconds = {"data": 0.0, "inference": 0.0, "eval": 0.0}
        self._counted = 0
        self._mark = time.perf_counter()

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        last_report = time.perf_counter()
        self._mark = self._began = time.perf_counter()
        for index, batch in enumerate(batches):
            if index == self._warm_up:
                # The wait for this batch started during the warm-up; what counts begins now.
                self._seconds = dict.fromkeys(self._seconds, 0.0)
                self._counted = 0
                self._began = self._mark
            self._add("data")
            yield batch
            self._add("eval")
            self._counted += 1
            now = time.perf_counter()
            if now - last_report >= _SECONDS_BETWEEN_REPORTS and index >= self._warm_up:
                last_report = now
                self._report(index + 1)

    def inference_done(self) -> None:
        self._add("inference")

    def _add(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] += now - self._mark
        self._mark = now

    def _per_batch(self, phase: str) -> float:
        return self._seconds[phase] / max(self._counted, 1)

    def _report(self, done: int) -> None:
        per_batch = (time.perf_counter() - self._began) / max(self._counted, 1)
        eta = datetime.timedelta(seconds=int(per_batch * (self._total - done)))
        self._log.info(
            "Inference done %d/%d. Dataloading: %.4f s/iter. Inference: %.4f s/iter. Eval: %.4f s/iter. "
            "Total: %.4f s/iter. ETA=%s",
            done,
            self._total,
            self._per_batch("data"),
            self._per_batch("inference"),
            self._per_batch("eval"),
            per_batch,
            eta,
        )

    def summarize(self) -> None:
        if not self._counted:
            self._log.warning("The data loader gave no batch: nothing was evaluated.")
            return
        devices = get_world_size()
        for what, seconds in (
            ("time", sum(self._seconds.values())),
            ("pure compute time", self._seconds["inference"]),
        ):
            self._log.info(
                "Total inference %s: %s (%.6f s / iter per device, on %d devices)",
                what,
                datetime.timedelta(seconds=int(seconds)),
                seconds / self._counted,
                devices,
            )
