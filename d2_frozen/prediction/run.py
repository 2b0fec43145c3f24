"""The loop of a prediction run: read ahead, predict in batches, write behind; nothing finished is ever lost."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from d2_frozen.prediction.inputs import Item, read_picture
from d2_frozen.prediction.outputs import OutputFolder
from d2_frozen.prediction.predictor import Predictor, Results
from d2_frozen.prediction.video_file import VideoReader, VideoWriter
from d2_frozen.tasks import ClipPrediction, Prediction

logger = logging.getLogger(__name__)

# Videos are read frame by frame, when their turn comes.
_NOTHING: Future = Future()
# Pictures of one size make a batch; of at most so many batches' pictures the loop keeps some waiting for others.
_WAITING_BATCHES = 4


class BadInputError(RuntimeError):
    """An input could not be predicted, and the run was to stop there (``strict``)."""


class OutputError(RuntimeError):
    """Results cannot be written: the disk is full, or not writable."""


@dataclass
class Settings:
    """How a run works.

    batch: pictures that go through the networks together.
    strict: stop at the first input that fails.
    pictures: write annotated pictures and videos.
    min_score: what scores lower is not drawn; files have everything.
    readers: threads that decode.
    """

    batch: int = 1
    strict: bool = False
    pictures: bool = True
    min_score: float = 0.5
    readers: int = 2


@dataclass
class Summary:
    """What a run did. ``failed``: name of an input -> why."""

    inputs: int = 0
    pictures: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    collected: list[Path] = field(default_factory=list)


class PredictionRun:
    """One run over items.

    Args:
        predictor: the heads.
        output: takes results.
        settings: how.
    """

    def __init__(self, predictor: Predictor, output: OutputFolder, settings: Settings) -> None:
        self.predictor, self.output, self.settings = predictor, output, settings
        self.summary = Summary()
        # One thread: lines of a file must not mix, and an input is finished after all that belongs to it.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._written: deque[tuple[Item | None, Future]] = deque()
        self._waiting: dict[tuple[int, ...], list[tuple[Item, np.ndarray]]] = defaultdict(list)

    def __call__(self, items: Sequence[Item]) -> Summary:
        """Predict all items that the output folder has not; whatever ends the run, what is finished is collected.

        Raises:
            BadInputError: an input failed, and ``strict``.
            OutputError: results cannot be written.
        """
        left = [item for item in items if not self.output.has(item)]
        self.output.drop_stale(left)
        total, unit = self._extent(left)
        # A line every ten seconds where it goes into a file.
        seconds = 0.5 if sys.stderr.isatty() else 10.0
        self._progress = tqdm(
            total=total,
            unit=unit,
            mininterval=seconds,
            maxinterval=seconds,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        try:
            with logging_redirect_tqdm([logging.getLogger("d2_frozen")]):
                self._predict(left)
        finally:
            self._progress.close()
            self._writer.shutdown(wait=True)
            try:
                self.summary.collected = self.output.collect()
            except OSError as err:
                raise _not_written(err) from err
            finally:
                self.output.close()
        return self.summary

    def _predict(self, items: list[Item]) -> None:
        for item, read in self._read_ahead(items):
            if item.is_video:
                self._guard(item, partial(self._video, item))
            else:
                self._guard(item, partial(self._take, item, read))
        self._predict_waiting(least=1)
        self._wait_for_writing(0)

    # ---- pictures

    def _take(self, item: Item, read: Callable[[], np.ndarray]) -> None:
        picture = read()
        if not self.predictor.picture_heads:
            raise ValueError("a picture, but all heads take videos")
        self._waiting[picture.shape].append((item, picture))
        full = self.settings.batch
        self._predict_waiting(least=full)
        if sum(map(len, self._waiting.values())) >= _WAITING_BATCHES * full:
            self._predict_waiting(least=1)

    def _predict_waiting(self, least: int) -> None:
        for shape in [shape for shape, group in self._waiting.items() if len(group) >= least]:
            group = self._waiting.pop(shape)
            found: list[Results] | None = None
            try:
                found = self.predictor.compact([picture for _, picture in group])
            except Exception as err:
                if len(group) == 1:
                    self._failed(group[0][0], err)
                    continue
            if found is None:
                # One of them may be the cause, or too little memory for all at once. Not in the handler of the error,
                # which keeps alive what the pass had computed.
                for item, picture in group:
                    self._guard(item, partial(self._alone, item, picture))
                continue
            for (item, picture), results in zip(group, found):
                self._write(item, self._write_picture, item, picture, results)

    def _alone(self, item: Item, picture: np.ndarray) -> None:
        (results,) = self.predictor.compact([picture])
        self._write(item, self._write_picture, item, picture, results)

    def _write_picture(self, item: Item, picture: np.ndarray, results: Results) -> None:
        self._add_records(item, picture, results)
        if self.settings.pictures:
            self.output.add_picture(item, self.predictor.draw(picture, results, self.settings.min_score))
        self.output.finish(item)
        self.summary.inputs += 1
        self._count()

    def _add_records(self, item: Item, picture: np.ndarray, results: Results, **frame: Any) -> None:
        height, width = picture.shape[:2]
        name = f"{item.stem}/{frame['frame']:06d}" if frame else item.stem
        for head in self.predictor.picture_heads:
            folder = self.output.folder / head.name
            record = _of_pictures(head.prediction).record(results[head.name], height, width, folder, name)
            facts = {"file": item.name, **frame, "height": height, "width": width}
            self.output.add(head.name, {**facts, **record})

    # ---- videos

    def _video(self, item: Item) -> None:
        reader = VideoReader(item.path)
        clips = self._clips(item)
        frames = 0
        if self.predictor.picture_heads or self.settings.pictures:
            with VideoWriter(self.output.picture_file(item), reader.rate) as annotated:
                try:
                    frames = self._frames(item, reader, clips, annotated if self.settings.pictures else None)
                finally:
                    self._wait_for_writing(0)  # nothing may come after the file is closed
            if frames == 0:
                raise ValueError("not one frame could be decoded")
            self._tell_missing(item, reader, frames)
        self._write(item, self._finish_video, item, frames)

    def _tell_missing(self, item: Item, reader: VideoReader, frames: int) -> None:
        """A cut or damaged video is predicted as far as it decodes, but not in silence."""
        claimed = reader.frames or 0  # where it is only estimated, a few frames too many
        if reader.damaged or frames < 0.95 * claimed - 2:
            logger.warning(
                "%s is cut or damaged: %d frames are predicted, of %s that it claims; %d packets do not decode.",
                item.path, frames, claimed or "?", reader.damaged,
            )  # fmt: skip

    def _frames(
        self,
        item: Item,
        reader: VideoReader,
        clips: dict[str, list[dict[str, Any]]],
        annotated: VideoWriter | None,
    ) -> int:
        frames = 0
        for batch in _batches(reader, self.settings.batch):
            pictures = [picture for _, picture in batch]
            for (seconds, picture), results in zip(batch, self.predictor.compact(pictures)):
                frame = {"frame": frames, "seconds": round(seconds, 4)}
                self._write(None, self._write_frame, item, picture, results, clips, frame, annotated)
                frames += 1
        return frames

    def _write_frame(
        self,
        item: Item,
        picture: np.ndarray,
        results: Results,
        clips: dict[str, list[dict[str, Any]]],
        frame: dict[str, Any],
        annotated: VideoWriter | None,
    ) -> None:
        if results:
            self._add_records(item, picture, results, **frame)
        if annotated is not None:
            drawn = self.predictor.draw(picture, results, self.settings.min_score)
            for head in self.predictor.clip_heads:
                now = [one for one in clips[head.name] if one["start"] <= frame["seconds"]]
                if now:
                    draw = _of_clips(head.prediction).draw
                    drawn = draw(drawn, now[-1], self.settings.min_score)
            annotated.add(drawn)
        self._count()

    def _clips(self, item: Item) -> dict[str, list[dict[str, Any]]]:
        """Records of every clip head, by its name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for head in self.predictor.clip_heads:
            prediction = _of_clips(head.prediction)
            records = found[head.name] = []
            for start, end, model_input in prediction.clips(item.path):
                place = {"file": item.name, "start": round(start, 4), "end": round(end, 4)}
                result = self.predictor.clip(head, model_input)
                records.append({**place, **prediction.record(result, model_input)})
            for record in records:
                self._write(None, self.output.add, head.name, record)
        return found

    def _finish_video(self, item: Item, frames: int) -> None:
        self.output.finish(item, **({"frames": frames} if frames else {}))
        self.summary.inputs += 1
        if self._progress.unit == "video":
            self._count()

    # ---- reading ahead, writing behind, failing

    def _read_ahead(self, items: list[Item]) -> Iterator[tuple[Item, Callable[[], np.ndarray]]]:
        ahead: deque[tuple[Item, Future]] = deque()
        upcoming = iter(items)
        with ThreadPoolExecutor(max(1, self.settings.readers), thread_name_prefix="reader") as readers:
            try:
                while True:
                    wanted = self.settings.readers + self.settings.batch - len(ahead)
                    for item in islice(upcoming, max(0, wanted)):
                        read = _NOTHING if item.is_video else readers.submit(read_picture, item.path)
                        ahead.append((item, read))
                    if not ahead:
                        return
                    item, future = ahead.popleft()
                    yield item, future.result
            finally:
                readers.shutdown(wait=False, cancel_futures=True)

    def _write(self, item: Item | None, work: Callable[..., None], *arguments: Any) -> None:
        """Hand work to the writing thread; an item that fails there is reported, other failures end the run."""
        future = self._writer.submit(work, *arguments)
        self._written.append((item, future))
        self._wait_for_writing(2 * self.settings.batch)

    def _wait_for_writing(self, pending: int) -> None:
        while len(self._written) > pending:
            item, future = self._written.popleft()
            try:
                future.result()
            except OSError as err:
                raise _not_written(err) from err
            except Exception as err:
                if item is None:
                    # What waits behind a frame is of the same video; the next input would be blamed for it.
                    wait([future for _, future in self._written])
                    self._written.clear()
                    raise
                self._failed(item, err)

    def _guard(self, item: Item, work: Callable[[], None]) -> None:
        try:
            work()
        except (BadInputError, OutputError):
            raise
        except Exception as err:
            self._failed(item, err)

    def _failed(self, item: Item, err: Exception) -> None:
        cause = f"{type(err).__name__}: {err}"
        if self.settings.strict:
            raise BadInputError(f"{item.path}: {cause}") from err
        self.summary.failed[item.name] = cause
        self.output.finish(item, error=cause)
        logger.error("%s failed, and is left out: %s", item.path, cause)
        self._progress.total = max(0, (self._progress.total or 1) - 1)

    # ---- progress

    def _extent(self, items: list[Item]) -> tuple[int, str]:
        """Pictures and frames to do; videos where no head takes frames and nothing is drawn."""
        if not self.predictor.picture_heads and not self.settings.pictures:
            return len(items), "video"
        total = 0
        for item in items:
            if item.is_video:
                try:
                    total += VideoReader(item.path).frames or 0
                except (ValueError, OSError):
                    total += 1  # it is reported when its turn comes
            else:
                total += 1
        return total, "image"

    def _count(self) -> None:
        self.summary.pictures += 1
        self._progress.update()


def _not_written(err: OSError) -> OutputError:
    return OutputError(
        f"results cannot be written: {err}. What is finished is kept; start again to go on, when there is room."
    )


def _batches(reader: VideoReader, size: int) -> Iterator[list[tuple[float, np.ndarray]]]:
    frames = iter(reader)
    while batch := list(islice(frames, size)):
        yield batch


def _of_pictures(prediction: Prediction | ClipPrediction) -> Prediction:
    return prediction  # type: ignore[return-value]


def _of_clips(prediction: Prediction | ClipPrediction) -> ClipPrediction:
    return prediction  # type: ignore[return-value]
