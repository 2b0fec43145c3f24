"""Which dataset indices does each rank see, and in which order?

Training samplers are endless: every rank walks the same seeded stream and takes every world_size-th
element of it. The inference sampler is finite and cuts the dataset into contiguous parts.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data.sampler import Sampler

from detectron2.utils import comm

__all__ = [
    "InferenceSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "TrainingSampler",
]

logger = logging.getLogger(__name__)


def _agreed_seed(seed: int | None) -> int:
    """The given seed, or one that all ranks draw together."""
    return int(comm.shared_random_seed() if seed is None else seed)


class _EndlessSampler(Sampler):
    """Shares one endless stream of indices between the ranks, which must agree on its seed.

    A subclass writes :meth:`_stream`, the same on every rank.
    """

    def __init__(self, shuffle: bool, seed: int | None):
        self._shuffle = shuffle
        self._seed = _agreed_seed(seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._stream(self._generator()), self._rank, None, self._world_size)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)

    def _stream(self, generator: torch.Generator) -> Iterator[int]:
        raise NotImplementedError


class TrainingSampler(_EndlessSampler):
    """Every index once per epoch, epoch after epoch, without end.

    Args:
        size: number of samples in the dataset.
        shuffle: draw a new order for every epoch.
        seed: of the order; None: drawn once and shared by the ranks.
    Raises:
        TypeError: ``size`` is no integer.
        ValueError: ``size`` is not positive.
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None):
        if not isinstance(size, int):
            raise TypeError(f"TrainingSampler: size is a number of samples (int), not {size!r}.")
        if size <= 0:
            raise ValueError(
                f"TrainingSampler: the dataset has {size} samples; there is nothing to draw from."
            )
        super().__init__(shuffle, seed)
        self._size = size

    def _stream(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            yield from _order(self._size, self._shuffle, generator)


def _order(size: int, shuffle: bool, generator: torch.Generator) -> list[int]:
    return torch.randperm(size, generator=generator).tolist() if shuffle else list(range(size))


class RandomSubsetTrainingSampler(_EndlessSampler):
    """Like TrainingSampler, on a fixed random part of the dataset.

    Args:
        size: number of samples in the dataset.
        subset_ratio: share of them to use, above 0 and at most 1.
        seed_shuffle: of the order.
        seed_subset: of the choice of the part.
    """

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ):
        if not 0.0 < subset_ratio <= 1.0:
            raise ValueError(
                f"subset_ratio is a share of the dataset, above 0 and at most 1, not {subset_ratio}."
            )
        super().__init__(shuffle, seed_shuffle)
        self._size = size
        self._size_subset = int(size * subset_ratio)
        if self._size_subset == 0:
            raise ValueError(f"subset_ratio={subset_ratio} of {size} samples is less than one sample.")
        chooser = torch.Generator().manual_seed(_agreed_seed(seed_subset))
        self._indexes_subset = torch.randperm(size, generator=chooser)[: self._size_subset].tolist()
        logger.info("Training on a random part of the data: %d of %d samples.", self._size_subset, size)

    def _stream(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            for place in _order(self._size_subset, self._shuffle, generator):
                yield self._indexes_subset[place]


class RepeatFactorTrainingSampler(_EndlessSampler):
    """Samples with rare classes come more often, each by its own repeat factor.

    A factor of 2.3 means twice in every epoch and a third time with probability 0.3.
    Source: Gupta et al., "LVIS", arXiv:1908.03195, section 5.3 (with Mahajan et al. 2018).

    Args:
        repeat_factors: (N,) float, one factor per sample, as by
            :meth:`repeat_factors_from_category_frequency`.
    """

    def __init__(self, repeat_factors: torch.Tensor, *, shuffle: bool = True, seed: int | None = None):
        super().__init__(shuffle, seed)
        self._whole = torch.trunc(repeat_factors)
        self._rest = repeat_factors - self._whole

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: list[dict[str, Any]], repeat_thresh: float, sqrt: bool = True
    ) -> torch.Tensor:
        """Factor of each image: that of its rarest class, max(1, (thresh / frequency) ** 0.5).

        Args:
            dataset_dicts: with ``annotations[i]["category_id"]``.
            repeat_thresh: share of images below which a class counts as rare.
            sqrt: False leaves the square root out.
        Returns:
            (N,) float32; 1 for images without annotations.
        """
        present = [{a["category_id"] for a in record["annotations"]} for record in dataset_dicts]
        images_with = Counter(itertools.chain.from_iterable(present))
        exponent = 0.5 if sqrt else 1.0
        factor_of = {
            category: max(1.0, (repeat_thresh / (count / len(dataset_dicts))) ** exponent)
            for category, count in images_with.items()
        }
        factors = [
            max((factor_of[category] for category in categories), default=1.0) for categories in present
        ]
        return torch.tensor(factors, dtype=torch.float32)

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        extra = torch.rand(len(self._rest), generator=generator) < self._rest
        counts = (self._whole + extra).long()
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def _stream(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            # How often each sample comes is drawn before the order.
            indices = self._epoch(generator)
            order = _order(len(indices), self._shuffle, generator)
            yield from indices[order].tolist()


class InferenceSampler(Sampler):
    """Each rank gets one contiguous part of the dataset, every sample exactly once.

    The first ``size % world_size`` ranks get one sample more than the others.

    Args:
        size: number of samples in the dataset.
    """

    def __init__(self, size: int):
        if size <= 0:
            raise AssertionError(
                f"InferenceSampler: the dataset has {size} samples; there is nothing to evaluate."
            )
        self._size = size
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()
        self._local_indices = self._get_local_indices(size, self._world_size, self._rank)

    @staticmethod
    def _get_local_indices(total_size: int, world_size: int, rank: int) -> range:
        share, longer = divmod(total_size, world_size)
        start = rank * share + min(rank, longer)
        return range(start, start + share + (rank < longer))

    def __iter__(self) -> Iterator[int]:
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)
