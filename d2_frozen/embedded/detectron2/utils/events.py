"""What happened in this iteration (EventStorage), and who writes it where (EventWriter).

Anywhere in the code: ``get_event_storage().put_scalar("loss", 0.5)``. The trainer opens the storage, counts
its iterations, and lets the writers pick up what is new: the terminal, ``metrics.json``, TensorBoard.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import time
from collections import defaultdict
from itertools import takewhile
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

from detectron2.utils.file_io import PathManager

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "get_event_storage",
    "has_event_storage",
]

# The open storages, innermost last. One list for all threads: hooks of the backward pass run in others.
_open_storages: list[EventStorage] = []


def get_event_storage() -> EventStorage:
    """The storage of the innermost ``with EventStorage()``.

    Raises:
        AssertionError: there is none.
    """
    if not _open_storages:
        raise AssertionError("no EventStorage is open: wrap the code in `with EventStorage() as storage:`.")
    return _open_storages[-1]


def has_event_storage() -> bool:
    """Is there an open storage?"""
    return bool(_open_storages)


class EventStorage:
    """Scalars with their history, and the pictures and histograms of the last iterations.

    Args:
        start_iter: the iteration to begin with; more than 0 for resumed runs.
    """

    def __init__(self, start_iter: int = 0) -> None:
        self._history: dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._smoothing_hints: dict[str, bool] = {}
        self._latest_scalars: dict[str, tuple[float, int]] = {}
        self._iter = start_iter
        self._current_prefix = ""
        self._vis_data: list[tuple[str, Any, int]] = []
        self._histograms: list[dict[str, Any]] = []

    def put_image(self, img_name: str, img_tensor: Any) -> None:
        """Keep a picture for TensorBoard.

        Args:
            img_tensor: (3, H, W) RGB; uint8, or float in [0, 1].
        """
        self._vis_data.append((img_name, img_tensor, self._iter))

    def put_scalar(
        self, name: str, value: Any, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Add a number to the history of ``name``.

        Args:
            value: anything ``float()`` takes.
            smoothing_hint: may writers show a median over some iterations? False for what must be exact, such
                as a learning rate or an AP. One name always has the same hint.
            cur_iter: the iteration it belongs to, if not the current one.
        Raises:
            AssertionError: the name was used with the other hint before.
        """
        full = self._current_prefix + name
        before = self._smoothing_hints.setdefault(full, smoothing_hint)
        if before != smoothing_hint:
            raise AssertionError(
                f"scalar {full} was put with smoothing_hint={before} before; keep to one value."
            )
        number, when = float(value), self._iter if cur_iter is None else cur_iter
        self._history[full].update(number, when)
        self._latest_scalars[full] = (number, when)

    def put_scalars(self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: Any) -> None:
        """``put_scalar`` for each keyword."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint, cur_iter)

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """Keep the distribution of a tensor's values for TensorBoard, in ``bins`` equal steps."""
        values = hist_tensor.detach().float().cpu().flatten()
        low, high = float(values.min()), float(values.max())
        counts = torch.histc(values, bins=bins, min=low, max=high)
        edges = torch.linspace(low, high, steps=bins + 1)
        self._histograms.append(
            {
                "tag": hist_name,
                "global_step": self._iter,
                "min": low,
                "max": high,
                "num": values.numel(),
                "sum": float(values.sum()),
                "sum_squares": float(values.square().sum()),
                # TensorBoard wants the upper edge of each bin.
                "bucket_limits": edges[1:].tolist(),
                "bucket_counts": counts.tolist(),
            }
        )

    def history(self, name: str) -> HistoryBuffer:
        """All values of one scalar.

        Raises:
            KeyError: no such scalar yet.
        """
        found = self._history.get(name)
        if found is None:
            raise KeyError(
                f"no scalar {name!r} yet; there are: {', '.join(sorted(self._history)) or 'none'}."
            )
        return found

    def histories(self) -> dict[str, HistoryBuffer]:
        """Scalar name -> its history."""
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """Scalar name -> (last value, its iteration)."""
        return self._latest_scalars

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """``latest``, with medians over ``window_size`` values for the scalars that may be smoothed.

        The window is shorter for scalars that were not put in every iteration: see ``count_samples``.
        """
        shown = {}
        for name, (value, when) in self._latest_scalars.items():
            if self._smoothing_hints[name]:
                value = float(self._history[name].median(self.count_samples(name, window_size)))
            shown[name] = (value, when)
        return shown

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """How many values of ``name`` came in the last ``window_size`` iterations that have any."""
        values = self._history[name].values()
        newest = values[-1][1]
        # From the end: the history may be a million entries long.
        return sum(1 for _ in takewhile(lambda entry: entry[1] > newest - window_size, reversed(values)))

    def smoothing_hints(self) -> dict[str, bool]:
        """Scalar name -> may it be smoothed?"""
        return self._smoothing_hints

    def step(self) -> None:
        """On to the next iteration; the trainer's job."""
        self._iter += 1

    @property
    def iter(self) -> int:
        """The current iteration, from 0."""
        return self._iter

    @iter.setter
    def iter(self, value: Any) -> None:
        self._iter = int(value)

    @property
    def iteration(self) -> int:
        """Older name of ``iter``."""
        return self._iter

    def name_scope(self, name: str) -> _NameScope:
        """``with storage.name_scope("stage0"):`` puts "stage0/" before the scalars inside."""
        return _NameScope(self, name)

    def clear_images(self) -> None:
        """Forget the pictures; writers call it once they are written."""
        self._vis_data = []

    def clear_histograms(self) -> None:
        """Forget the histograms; writers call it once they are written."""
        self._histograms = []

    def __enter__(self) -> EventStorage:
        _open_storages.append(self)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        innermost = _open_storages.pop()
        assert innermost is self, "event storages must be closed in the reverse order of opening"


class _NameScope:
    def __init__(self, storage: EventStorage, name: str) -> None:
        self._storage, self._prefix = storage, name.rstrip("/") + "/"

    def __enter__(self) -> None:
        self._before = self._storage._current_prefix
        self._storage._current_prefix = self._prefix

    def __exit__(self, *exc_info: Any) -> None:
        self._storage._current_prefix = self._before


class EventWriter:
    """Base of what shows or stores the content of the open storage. ``close`` is called at the end of the
    run.
    """

    def write(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define write().")

    def close(self) -> None:
        return


class JSONWriter(EventWriter):
    """Appends one JSON object per iteration to a file (``metrics.json``); each has "iteration".

    Args:
        json_file: path; an existing file is continued.
        window_size: iterations for the medians of smoothed scalars.
    """

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        self._file_handle = PathManager.open(json_file, "a")
        self._window_size = window_size
        self._last_write = -1

    def write(self) -> None:
        storage = get_event_storage()
        by_iteration: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, when) in storage.latest_with_smoothing_hint(self._window_size).items():
            if when > self._last_write:
                by_iteration[when][name] = value
        if not by_iteration:
            return
        self._last_write = max(by_iteration)
        for when, values in sorted(by_iteration.items()):
            self._file_handle.write(json.dumps({**values, "iteration": when}, sort_keys=True) + "\n")
        # To the disk, so that a killed run keeps its curve.
        self._file_handle.flush()
        try:
            os.fsync(self._file_handle.fileno())
        except (AttributeError, OSError):
            logging.getLogger(__name__).debug("metrics file cannot be synced to disk (not a plain file)")

    def close(self) -> None:
        self._file_handle.close()


class TensorboardXWriter(EventWriter):
    """Scalars, pictures and histograms for TensorBoard.

    Args:
        log_dir: folder for the event files.
        window_size: iterations for the medians of smoothed scalars.
        kwargs: go to ``torch.utils.tensorboard.SummaryWriter``.
    """

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        self._log_dir, self._options = log_dir, kwargs
        self._window_size = window_size
        self._last_write = -1
        self._opened: Any = None

    @property
    def _writer(self) -> Any:
        # Opened with the first event, so that a run which fails early leaves no empty files.
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            self._opened = SummaryWriter(self._log_dir, **self._options)
        return self._opened

    def write(self) -> None:
        storage = get_event_storage()
        newest = self._last_write
        for name, (value, when) in storage.latest_with_smoothing_hint(self._window_size).items():
            if when > self._last_write:
                self._writer.add_scalar(name, value, when)
                newest = max(newest, when)
        self._last_write = newest
        for name, picture, when in storage._vis_data:
            self._writer.add_image(name, picture, when)
        storage.clear_images()
        for histogram in storage._histograms:
            self._writer.add_histogram_raw(**histogram)
        storage.clear_histograms()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()


class CommonMetricPrinter(EventWriter):
    """One line in the log per call: ETA, iteration, losses, metrics, times, learning rate, peak memory.

    Losses are scalars with "loss" in their names, metrics those with "[metric]".

    Args:
        max_iter: iterations of the run, for the ETA; None for no ETA.
        window_size: iterations for the medians of losses and metrics.
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        self.logger = logging.getLogger("detectron2.utils.events")
        self._max_iter = max_iter
        self._window_size = window_size
        # (iteration, clock) of the previous line: stands in for the ETA while there is no "time" scalar.
        self._last_write: tuple[int, float] | None = None

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            # After the last iteration the hooks write once more; that line would repeat the previous one.
            return
        parts = [f" iter: {storage.iter}"]
        eta = self._get_eta(storage)
        if eta is not None:
            parts.insert(0, f" eta: {eta}")
        parts += self._losses(storage)
        parts += self._named_metrics(storage)
        parts += self._times(storage)
        if "lr" in storage.histories():
            parts.append(f"lr: {storage.history('lr').latest():.5g}")
        parts.append(_memory_text())
        self.logger.info("  ".join(part for part in parts if part))

    def _losses(self, storage: EventStorage) -> list[str]:
        return [
            f"{name}: {history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in storage.histories().items()
            if "loss" in name
        ]

    def _named_metrics(self, storage: EventStorage) -> list[str]:
        """Scalars whose name has "[metric]" in it: numbers of a model that should be in the log too."""
        return [
            f"{name}: {history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in storage.histories().items()
            if "[metric]" in name and "loss" not in name
        ]

    def _times(self, storage: EventStorage) -> list[str]:
        parts = []
        if "time" in storage.histories():
            times = storage.history("time")
            parts += [f"time: {times.global_avg():.4f}", f"last_time: {times.latest():.4f}"]
        if "data_time" in storage.histories():
            # Recent ones only: the first batch waits for the workers to start.
            times = storage.history("data_time")
            recent = times.avg(storage.count_samples("data_time", self._window_size))
            parts += [f"data_time: {recent:.4f}", f"last_data_time: {times.latest():.4f}"]
        return parts

    def _get_eta(self, storage: EventStorage) -> str | None:
        """Remaining time as h:mm:ss; also put into the storage as eta_seconds."""
        if self._max_iter is None:
            return None
        remaining = self._max_iter - storage.iter - 1
        if "time" in storage.histories():
            seconds = storage.history("time").median(1000) * remaining
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            return str(datetime.timedelta(seconds=int(seconds)))
        now = (storage.iter, time.perf_counter())
        before, self._last_write = self._last_write, now
        if before is None or before[0] == now[0]:
            return None
        per_iteration = (now[1] - before[1]) / (now[0] - before[0])
        return str(datetime.timedelta(seconds=int(per_iteration * remaining)))


def _memory_text() -> str:
    """Peak of the GPU memory of this process; without a GPU, the peak of its main memory."""
    if torch.cuda.is_available():
        return f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return f"max_mem: {peak / (2**20 if sys.platform == 'darwin' else 2**10):.0f}M (host)"
