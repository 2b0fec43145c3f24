"""Batches for training and evaluation, by the contract of ``draws.py``.

A sample is (position in the endless stream over all ranks, index in the dataset). The stream of indices is
Detectron2's sampler for the same seed; grouping by aspect ratio happens on indices, before anything is read,
so a resumed run replays the stream without reading images.
"""

from __future__ import annotations

import errno
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, NamedTuple

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from d2_frozen.caching import FEATURES, SLOT, FeatureCache
from d2_frozen.data.cached_mapper import FrozenDatasetMapper
from d2_frozen.data.device import Pinnable
from d2_frozen.data.draws import draw_index, image_number, seeded
from d2_frozen.data.frames import image_size
from d2_frozen.data.subset import training_records
from d2_frozen.data.transforms import build_augmentations, changes_frame
from d2_frozen.data.workers import (
    LOST_WORKER,
    SharedMemoryError,
    allow_open_files,
    deaths_told_in_turn,
    hand_on,
    is_lost_worker,
    outlive_signals,
    workers_cannot_start,
)
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Mapper = Callable[[Record], Any]
_MAX_REDRAWS = 20
# What network file systems say while their server is away, and how long it is waited for.
_PASSING = {
    getattr(errno, name)
    for name in (
        "EIO",
        "ESTALE",
        "ETIMEDOUT",
        "ENOTCONN",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ECONNRESET",
        "EREMOTEIO",
    )
    if hasattr(errno, name)
}
_WAITS_S = (1, 5, 20)
# Workers that die are started anew, but for more than so many times within so many batches.
_LOSSES, _WITHIN_BATCHES = 3, 1000


def build_train_loader(
    cfg: CfgNode,
    start_iteration: int = 0,
    mapper: Mapper | None = None,
    dataset: Sequence[Record] | None = None,
) -> TrainLoader:
    """Endless batches of this rank, as lists of samples.

    Args:
        cfg: ``SEED`` must not be negative.
        start_iteration: batches before it are skipped, without reading their images.
        mapper: record -> sample, or None for a sample to be replaced; Detectron2's DatasetMapper with
            ``build_augmentations`` if None. May draw from random, numpy and torch.
        dataset: records in Detectron2's format; ``training_records`` if None.
    Raises:
        ValueError: negative seed, unknown sampler, a batch size that the ranks cannot share, or records without
            "width" and "height", or a file, where DATALOADER.ASPECT_RATIO_GROUPING needs them.
    """
    if cfg.SEED < 0:
        raise ValueError("SEED is negative, but data draws are functions of it; set SEED >= 0.")
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a positive multiple of the "
            f"{world_size} processes."
        )
    if dataset is None:
        dataset = training_records(cfg)
    mapper = _default_mapper(cfg, is_train=True) if mapper is None else mapper
    wide = _wide(dataset) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
    settings = cfg.MODEL.FROZEN.CACHE
    return TrainLoader(
        DrawnDataset(
            dataset,
            mapper,
            cfg.SEED,
            skip_bad=cfg.DATASETS.SKIP_BAD,
            views=Views(settings.VIEWS, settings.SEED) if settings.VIEWS else None,
        ),
        sampler=_build_sampler(cfg, dataset),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // world_size,
        wide=wide,
        start_iteration=start_iteration,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available(),
    )


def _wide(records: Sequence[Record]) -> list[bool]:
    """Of each record, whether its image is wider than high; where it does not tell, by the header of the file."""
    wide = []
    for record in records:
        if "width" in record and "height" in record:
            height, width = record["height"], record["width"]
        elif "file_name" in record:
            height, width = image_size(record["file_name"])
        else:
            raise ValueError(
                f"a record has no 'width' and 'height', by which images are grouped (it has {', '.join(record)}). Add "
                "them, or set DATALOADER.ASPECT_RATIO_GROUPING False."
            )
        wide.append(width > height)
    return wide


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None, indices: Sequence[int] | None = None
) -> DataLoader:
    """One image per batch, in dataset order, each rank its share.

    Args:
        indices: only these records, and all of them on every rank.
    """
    records = get_detection_dataset_dicts([dataset_name], filter_empty=False)
    sampler = None
    if indices is not None:
        records = [records[i] for i in indices]
        sampler = SequentialSampler(records)
    return build_detection_test_loader(
        records,
        mapper=_default_mapper(cfg, is_train=False) if mapper is None else mapper,
        sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=hand_on,
    )


class Place(NamedTuple):
    """Which sample: ``position`` in the stream over all ranks, from 0; ``record_index`` in the dataset."""

    position: int
    record_index: int


class Views(NamedTuple):
    """So many augmented views of each image, drawn from ``seed``; each pass over the data takes the next one."""

    per_image: int
    seed: int


class SampleError(RuntimeError):
    """A record could not be made into a sample; names its file and image id."""


class Drawn(NamedTuple):
    """What came of a place: a sample, or ``error`` and the ``traceback`` of its cause.

    ``faults``: texts about records that failed before, in whose place the sample is.
    ``place``: the one that was asked for.
    """

    sample: Any = None
    faults: tuple[str, ...] = ()
    error: str = ""
    traceback: str = ""
    place: Place | None = None


class DrawnDataset(Dataset):
    """``dataset[Place(position, index)]`` is a ``Drawn`` whose every draw depends on (seed, position).

    With ``views``, how a record is augmented depends on (seed of the views, image, view) instead.

    Another record, drawn from (seed, position) too, takes the place of one for which the mapper returns None
    or, with ``skip_bad``, raises. Errors are values here: raised in a worker, they would lose their class,
    and torch then takes seconds to end its workers.
    """

    def __init__(
        self,
        records: Sequence[Record],
        mapper: Mapper,
        seed: int,
        skip_bad: bool,
        views: Views | None = None,
    ):
        self.records = DatasetFromList(list(records), copy=False)
        self.mapper = mapper
        self.seed = seed
        self.skip_bad = skip_bad
        self.views = views

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: Place) -> Drawn:
        position, index = place
        faults: tuple[str, ...] = ()
        for redraw in range(_MAX_REDRAWS + 1):
            record = self.records[index]
            try:
                sample = self._mapped(record, position, redraw)
                if sample is not None:
                    return Drawn(sample, faults, place=place)
            except Exception as err:
                fault = (
                    f"image {record.get('image_id')!r}, {record.get('file_name')}, failed at position "
                    f"{position} of the sample stream: {type(err).__name__}: {err}"
                )
                if not self.skip_bad:
                    if not getattr(err, "says_what_to_do", False):
                        fault += ". Correct it, or set DATASETS.SKIP_BAD True to draw another image."
                    return Drawn(error=fault, traceback=traceback.format_exc())
                faults = (*faults, fault)
            index = draw_index(len(self.records), self.seed, position, redraw)
        # The first of each cause: with one that all images share, twenty lines would say the same.
        by_cause = {fault.split(" of the sample stream: ")[-1]: fault for fault in reversed(faults)}
        why_none = getattr(self.mapper, "why_none", None)
        told = "; ".join(reversed(by_cause.values())) or (
            why_none(record) if why_none else "the mapper returned None for each of them"
        )
        return Drawn(error=f"no sample at position {position} after {_MAX_REDRAWS} redraws: {told}")

    def _mapped(self, record: Record, position: int, redraw: int) -> Any:
        for seconds in (*_WAITS_S, None):
            try:
                with self._draws(record, position, redraw):
                    return self.mapper(record)
            except Exception as err:
                if seconds is None or not _may_pass(err):
                    raise
                logger.warning("%s: %s. Tried again in %d s.", record.get("file_name"), err, seconds)
                time.sleep(seconds)
        return None

    def _draws(self, record: Record, position: int, redraw: int) -> AbstractContextManager[None]:
        if self.views is None:
            return seeded(self.seed, position, redraw)
        view = position // len(self.records) % self.views.per_image
        return seeded(self.views.seed, image_number(record), view)


class TrainLoader:
    """Iterating gives the batches of this rank from ``start_iteration`` on, without end.

    ``replaced`` counts the samples that failed and were replaced, of the batches handed out so far.
    """

    def __init__(
        self,
        dataset: DrawnDataset,
        sampler: Iterable[int],
        batch_size: int,
        wide: Sequence[bool] | None = None,
        start_iteration: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        """
        Args:
            dataset: what reads the samples.
            sampler: this rank's endless share of the index stream.
            batch_size: of this rank.
            wide: per record, is it wider than high? Then a batch has images of one kind only.
            start_iteration, num_workers: see ``build_train_loader``; neither changes what a batch holds.
            pin_memory: a thread puts what comes from the workers into pinned memory, for a GPU to fetch.
        """
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.wide = wide
        self.start_iteration = start_iteration
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.replaced = 0
        self.cache: FeatureCache | None = None

    def use_cache(self, cache: FeatureCache) -> None:
        """Let samples bring the features of their images along, under ``FEATURES``, where ``cache`` has them.

        Raises:
            ValueError: the mapper cannot do this.
        """
        mapper = self.dataset.mapper
        if not hasattr(mapper, "cache"):
            raise ValueError(
                f"MODEL.FROZEN.CACHE.DIR is set, but the mapper {type(mapper).__name__} does not use a cache: it has "
                "no attribute `cache` (docs/feature_cache.md says what it must do). Set DIR to '' for this data."
            )
        self.cache = mapper.cache = cache

    def __iter__(self) -> Iterator[list[Any]]:
        done, lost_at = 0, []
        arriving = self._arriving(done)
        while True:
            lost = ""
            try:
                batch = next(arriving)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as err:
                lost = f"{type(err).__name__}: {err}".strip()
                lost_at.append(done)
                if not is_lost_worker(err):
                    raise
                if len(lost_at) > _LOSSES and done - lost_at[-1 - _LOSSES] < _WITHIN_BATCHES:
                    raise RuntimeError(f"{lost}; {len(lost_at)} times now. {LOST_WORKER}") from err
            if lost:
                logger.warning("%s. Workers begin anew with the batch that is missing. %s", lost, LOST_WORKER)
                arriving = self._arriving(done)
                continue
            for drawn in batch.drawn:
                self.tell(drawn)
            done += 1
            yield [self._with_features(drawn) for drawn in batch.drawn]

    def _arriving(self, done: int) -> Iterator[Pinnable]:
        """From workers that begin behind so many batches."""
        batches = DataLoader(
            self.dataset,
            batch_sampler=_Places(self, done),
            num_workers=self.num_workers,
            collate_fn=_handed_on,
            # Without workers there is no thread for it, and the copy to the GPU would not be faster.
            pin_memory=self.pin_memory and self.num_workers > 0,
            worker_init_fn=_begin,
            # Its own: otherwise starting the workers would draw from the global generator.
            generator=torch.Generator(),
        )
        if not self.num_workers:
            return iter(batches)
        allow_open_files()
        try:
            with deaths_told_in_turn():
                return iter(batches)
        except OSError as err:
            raise workers_cannot_start(err) from err

    def _with_features(self, drawn: Drawn) -> Any:
        """The sample; features that its worker found are mapped into the memory of this process."""
        if self.cache is None or SLOT not in drawn.sample:
            return drawn.sample
        slot = drawn.sample[SLOT]
        features = self.cache.fetch(slot)
        if features is not None:
            drawn.sample[FEATURES] = features
        elif slot.place is not None and drawn.place is not None:
            # Found, but deleted since: what is missing now are the pixels.
            mapper, self.dataset.mapper.cache = self.dataset.mapper, None  # type: ignore[attr-defined]
            try:
                drawn = self.dataset[drawn.place]
            finally:
                mapper.cache = self.cache  # type: ignore[attr-defined]
            self.tell(drawn)
        return drawn.sample

    def tell(self, drawn: Drawn) -> None:
        """Log what was replaced.

        Raises:
            SampleError: there is no sample.
        """
        for fault in drawn.faults:
            self.replaced += 1
            logger.warning("DATASETS.SKIP_BAD: %s; replaced, %d so far.", fault, self.replaced)
        if drawn.error:
            raise SampleError(drawn.error) from (RuntimeError(drawn.traceback) if drawn.traceback else None)

    def places(self) -> Iterator[list[Place]]:
        """What the batches are made of; nothing is read."""
        stream = self._place_stream()
        if self.wide is None:
            batches = _batches_in_order(stream, self.batch_size)
        else:
            batches = _batches_by_group(stream, self.batch_size, self.wide)
        return islice(batches, self.start_iteration, None)

    def _place_stream(self) -> Iterator[Place]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        for count, index in enumerate(self.sampler):
            yield Place(rank + count * world_size, int(index))


def require_reachable(path: str) -> None:
    """For mappers that note files as bad for good.

    Raises:
        OSError: it is the file system that fails; the loader tries the record again.
    """
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as err:  # also of a folder, and of a file that is not there
        if err.errno in _PASSING:
            raise


def _may_pass(err: BaseException | None) -> bool:
    """Is it the file system that failed for now, a server that starts anew, say, and not the file that is bad?"""
    seen: set[int] = set()
    while err is not None and id(err) not in seen:
        seen.add(id(err))
        if isinstance(err, OSError) and err.errno in _PASSING:
            return True
        err = err.__cause__ or err.__context__
    return False


def _handed_on(drawn: list[Drawn]) -> Pinnable:
    try:
        return Pinnable(hand_on(drawn))
    except SharedMemoryError as err:
        return Pinnable([Drawn(error=str(err))])


def _begin(worker: int) -> None:
    """In a worker. OpenCV's threads, one per core in each worker, would only queue; torch starts none there."""
    outlive_signals()
    cv2.setNumThreads(0)


class _Places:
    """A TrainLoader's places as torch wants a batch sampler: an object to iterate, not an iterator."""

    def __init__(self, loader: TrainLoader, done: int):
        self._loader, self._done = loader, done

    def __iter__(self) -> Iterator[list[Place]]:
        return islice(self._loader.places(), self._done, None)


def _batches_in_order(stream: Iterator[Place], size: int) -> Iterator[list[Place]]:
    while batch := list(islice(stream, size)):
        yield batch


def _batches_by_group(stream: Iterator[Place], size: int, group_of: Sequence[bool]) -> Iterator[list[Place]]:
    """A batch is given as soon as its group has enough; the others wait."""
    waiting: dict[bool, list[Place]] = {True: [], False: []}
    for place in stream:
        group = waiting[group_of[place.record_index]]
        group.append(place)
        if len(group) == size:
            yield group.copy()
            group.clear()


def _default_mapper(cfg: CfgNode, is_train: bool) -> FrozenDatasetMapper:
    keypoints = is_train and cfg.MODEL.KEYPOINT_ON  # an installed Detectron2 has heads for them
    mapper = FrozenDatasetMapper(
        is_train,
        augmentations=build_augmentations(cfg, is_train),
        image_format=cfg.INPUT.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=cfg.INPUT.MASK_FORMAT,
        recompute_boxes=is_train and cfg.MODEL.MASK_ON and changes_frame(cfg),
        use_keypoint=keypoints,
        keypoint_hflip_indices=create_keypoint_hflip_indices(cfg.DATASETS.TRAIN) if keypoints else None,
    )
    mapper.fast_reading = cfg.INPUT.FAST_READING
    mapper.ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    return mapper


def _build_sampler(cfg: CfgNode, records: Sequence[Record]) -> Iterable[int]:
    name, seed = cfg.DATALOADER.SAMPLER_TRAIN, cfg.SEED
    if name == "TrainingSampler":
        return TrainingSampler(len(records), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        if not all("annotations" in record for record in records):
            raise ValueError(
                "DATALOADER.SAMPLER_TRAIN is RepeatFactorTrainingSampler, which repeats images of rare objects, but "
                "this data has no objects ('annotations'), as label maps and videos have none. Choose TrainingSampler."
            )
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    if name == "RandomSubsetTrainingSampler":
        # Detectron2 has no default for this key; a project that uses the sampler adds it.
        ratio = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO")
        if ratio is None:
            raise ValueError(
                "DATALOADER.SAMPLER_TRAIN is RandomSubsetTrainingSampler, whose key DATALOADER.RANDOM_SUBSET_RATIO is "
                "no key of Detectron2's: code of your own must add it. To train on a share of the images, set "
                "DATASETS.SUBSET.PERCENT."
            )
        return RandomSubsetTrainingSampler(len(records), ratio, seed_shuffle=seed, seed_subset=seed)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; choose TrainingSampler, RepeatFactorTrainingSampler or "
        "RandomSubsetTrainingSampler."
    )
