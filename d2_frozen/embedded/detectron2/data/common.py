"""How is a list of dicts kept in memory, mapped, made iterable, and put into batches?"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import data

from detectron2.utils.serialize import PicklableWrapper

__all__ = [
    "AspectRatioGroupedDataset",
    "DatasetFromList",
    "MapDataset",
    "ToIterableDataset",
    "set_default_dataset_from_list_serialize_method",
]

logger = logging.getLogger(__name__)


class MapDataset(data.Dataset):
    """A dataset whose samples go through a function; samples that the function gives up are replaced.

    Where ``map_func`` returns None for a sample (e.g. no box survived the crop), another sample takes its
    place. Which one depends on the index alone, so it is the same in every worker and after a resume.
    Over an iterable dataset such samples are left out instead.

    Args:
        dataset: a map-style or an iterable dataset.
        map_func: sample -> mapped sample or None.
    """

    def __new__(cls, dataset: Any, map_func: Callable[[Any], Any]) -> Any:
        if isinstance(dataset, data.IterableDataset):
            return _MappedIterable(dataset, map_func)
        return super().__new__(cls)

    # A pickled MapDataset (loader workers started by "spawn") is rebuilt through __new__.
    def __getnewargs__(self) -> tuple[Any, Callable[[Any], Any]]:
        return self._dataset, self._map_func

    def __init__(self, dataset: Any, map_func: Callable[[Any], Any]):
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        mapped = self._map_func(self._dataset[index])
        return mapped if mapped is not None else self._replacement(index)

    def _replacement(self, index: int) -> Any:
        others = [i for i in range(len(self)) if i != index]
        random.Random(index).shuffle(others)
        for tried, other in enumerate(others, start=1):
            mapped = self._map_func(self._dataset[other])
            if mapped is not None:
                return mapped
            if tried == 3:
                logger.warning(
                    "The mapper gave up sample %d and also %d samples tried in its place.", index, tried
                )
        raise ValueError(
            f"the mapper returned None for every one of the {len(self)} samples; nothing is left to train on."
        )


class _MappedIterable(data.IterableDataset):
    def __init__(self, dataset: Iterable[Any], map_func: Callable[[Any], Any]):
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        mapped = map(self._map_func, self._dataset)
        return (sample for sample in mapped if sample is not None)


class _OneBuffer:
    """A read-only list whose elements lie, serialized, in one tensor.

    A list of a million dicts has millions of reference counts; touching them in forked workers copies
    every page. One tensor has one, so all workers share the memory. Pickle is safe here: only bytes
    written by this very object are ever read back.
    """

    def __init__(self, elements: Sequence[Any]):
        chunks = [np.frombuffer(pickle.dumps(e, protocol=-1), dtype=np.uint8) for e in elements]
        self._ends = torch.from_numpy(np.cumsum([len(c) for c in chunks], dtype=np.int64))
        self._bytes = torch.from_numpy(np.concatenate(chunks) if chunks else np.empty(0, np.uint8))
        logger.info("Dataset of %d elements serialized to %.2f MiB.", len(chunks), len(self._bytes) / 2**20)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} in a dataset of {len(self)} elements")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return pickle.loads(memoryview(self._bytes[start : int(self._ends[index])].numpy()))


_Serializer = Callable[[Sequence[Any]], Any]
_default_serializer: _Serializer = _OneBuffer


@contextlib.contextmanager
def set_default_dataset_from_list_serialize_method(new: _Serializer) -> Iterator[None]:
    """Inside this context ``DatasetFromList(serialize=True)`` stores its list by ``new``: list ->
    list-like.
    """
    global _default_serializer
    before, _default_serializer = _default_serializer, new
    try:
        yield
    finally:
        _default_serializer = before


class DatasetFromList(data.Dataset):
    """A list as a map-style dataset.

    Args:
        lst: the elements.
        copy: hand out deep copies, so that a mapper may change them.
        serialize: keep the elements in one shared buffer (each access then gives a fresh object anyway);
            or a function list -> list-like that does its own storing.
    """

    def __init__(self, lst: Sequence[Any], copy: bool = True, serialize: bool | _Serializer = True):
        if not isinstance(serialize, bool) and not callable(serialize):
            raise TypeError(f"serialize is True, False or a function, not {serialize!r}.")
        self._copy = copy
        self._serialized = bool(serialize)
        if self._serialized:
            store = _default_serializer if serialize is True else serialize
            self._elements = store(lst)
        else:
            self._elements = lst

    def __len__(self) -> int:
        return len(self._elements)

    def __getitem__(self, index: int) -> Any:
        element = self._elements[index]
        return copy.deepcopy(element) if self._copy and not self._serialized else element


class ToIterableDataset(data.IterableDataset):
    """A map-style dataset read in a sampler's order.

    Args:
        dataset: map-style.
        sampler: indices, in the order of this rank.
        shard_sampler: inside loader workers every worker takes its share of the indices. False where the
            sampler already differs between workers.
        shard_chunk_size: length of the runs of consecutive indices that one worker takes at a time; with the
            batch size here, batches do not depend on the number of workers.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        sampler: Iterable[int],
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ):
        if isinstance(dataset, data.IterableDataset):
            raise AssertionError("ToIterableDataset takes a map-style dataset; this one is iterable already.")
        if not isinstance(sampler, Iterable):
            raise AssertionError(f"sampler must be an iterable of indices, not {sampler!r}.")
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __iter__(self) -> Iterator[Any]:
        indices = (
            _share_of_this_worker(self.sampler, self.shard_chunk_size) if self.shard_sampler else self.sampler
        )
        for index in indices:
            yield self.dataset[index]

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


def _share_of_this_worker(indices: Iterable[int], chunk_size: int) -> Iterator[int]:
    """All indices in the main process; in worker k of n every n-th chunk, beginning with the k-th."""
    worker = data.get_worker_info()
    if worker is None:
        yield from indices
        return
    for place, index in enumerate(indices):
        if place // chunk_size % worker.num_workers == worker.id:
            yield index


class AspectRatioGroupedDataset(data.IterableDataset):
    """Batches in which all images are wide, or all are not, to waste little on padding.

    Args:
        dataset: iterable of dicts with "width" and "height".
        batch_size: samples per batch. What is left in an unfilled batch at the end is dropped.
    """

    def __init__(self, dataset: Iterable[dict[str, Any]], batch_size: int):
        self.dataset = dataset
        self.batch_size = batch_size
        self._buckets: list[list[dict[str, Any]]] = [[], []]

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # What waits for a batch: not wide, wide. A new iteration begins with none.
        self._buckets = waiting = [[], []]
        for sample in self.dataset:
            is_wide = sample["width"] > sample["height"]
            waiting[is_wide].append(sample)
            if len(waiting[is_wide]) == self.batch_size:
                full, waiting[is_wide] = waiting[is_wide], []
                yield full
