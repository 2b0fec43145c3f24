"""A frozen backbone that answers sample by sample: from stored features where a sample brings them, else by running.

In: a batch of images, and the samples it was made of.  Out: maps by name, as the backbone gives them, put together.

Each sample is computed by itself, padded as if it were alone, and its maps are then padded with zeros to those of the
batch. So what a sample's features are does not depend on what else is in the batch, nor, bit for bit, on whether they
were computed now or read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2_frozen.caching import FEATURES, SLOT, FeatureCache

if TYPE_CHECKING:
    from d2_frozen.backbone.frozen import FrozenBackbone

Compute = Callable[[Tensor], Mapping[str, Tensor]]
Sample = Mapping[str, Any]


class FeatureService:
    """Tells the frozen backbone of a model, batch by batch in training, where its images come from.

    Args:
        model: is called with a list of samples, and has ``preprocess_image`` if these are images.
        frozen: the backbone in it.
        cache: stores what is computed; None computes all, sample by sample.
        names: the maps that the neck or head takes; others are left out. All if None.
    """

    def __init__(
        self,
        model: nn.Module,
        frozen: FrozenBackbone,
        cache: FeatureCache | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.frozen = frozen
        self.cache = cache
        self.names = None if names is None else tuple(names)
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}
        self._hooks = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @contextlib.contextmanager
    def serving(self, samples: Sequence[Sample]) -> Iterator[None]:
        """Within, the images that the backbone gets are those of these samples, in this order."""
        self.frozen.by_sample = Batch(samples, self._padded_hw, self.cache, self.names)
        try:
            yield
        finally:
            self.frozen.by_sample = None

    def remove(self) -> None:
        """The model is again as it was."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if module.training:
            self.frozen.by_sample = Batch(arguments[0], self._padded_hw, self.cache, self.names)

    def _after(self, *_: Any) -> None:
        self.frozen.by_sample = None

    def _padded_hw(self, sample: Sample) -> tuple[int, int]:
        own = tuple(sample["image"].shape[-2:])
        if own not in self._sizes:
            batch = self.model.preprocess_image([sample])  # type: ignore[operator]
            self._sizes[own] = tuple(batch.tensor.shape[-2:])
        return self._sizes[own]


class Batch:
    """Samples whose images a backbone is about to get; ``FrozenBackbone.by_sample`` while they come.

    Args:
        padded_hw: height and width to which a sample's image is padded when it is alone.
        cache, names: as in :class:`FeatureService`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        padded_hw: Callable[[Sample], tuple[int, int]],
        cache: FeatureCache | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.cache = cache
        self.names = names
        self._samples = list(samples)
        self._padded_hw = padded_hw
        self._next = 0
        # Of the next sample: how many of its images came already, and what was computed of them.
        self._row = 0
        self._begun: list[Mapping[str, Tensor]] = []

    def __call__(self, images: Tensor, compute: Compute, dtype: torch.dtype) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images -> maps of B rows in ``dtype``. A batch may come in several calls.

        Raises:
            ValueError: there are more images than the samples have.
        """
        parts: list[Mapping[str, Tensor]] = []
        at = 0
        while at < len(images):
            if self._next == len(self._samples):
                raise ValueError(
                    f"the backbone got {len(images)} images, {len(images) - at} more than the samples of the batch "
                    "have. With MODEL.FROZEN.CACHE.VIEWS above 0 it must get each image of a batch once, and in order."
                )
            sample = self._samples[self._next]
            count = min(rows_of(sample) - self._row, len(images) - at)
            parts.append(self._maps_of(sample, images[at : at + count], compute))
            at += count
            self._row += count
            if self._row == rows_of(sample):
                self._store(sample)
                self._next, self._row, self._begun = self._next + 1, 0, []
        return _together(parts, images, dtype)

    def _maps_of(self, sample: Sample, images: Tensor, compute: Compute) -> Mapping[str, Tensor]:
        if FEATURES in sample:
            return {name: one[self._row : self._row + len(images)] for name, one in sample[FEATURES].items()}
        if "image" in sample:
            height, width = self._padded_hw(sample)
            images = images[..., :height, :width].contiguous()
        maps = compute(images)
        maps = {name: maps[name] for name in self.names or maps}
        if self.cache is not None:
            maps = {name: one.to(self.cache.dtype) for name, one in maps.items()}
            self._begun.append(maps)
        return maps

    def _store(self, sample: Sample) -> None:
        slot = sample.get(SLOT)
        if self.cache is None or slot is None or slot.place is not None or not self._begun:
            return
        whole = self._begun[0]
        if len(self._begun) > 1:
            whole = {name: torch.cat([part[name] for part in self._begun]) for name in whole}
        self.cache.put(slot, whole)


def rows_of(sample: Sample) -> int:
    """Images that a sample gives the backbone: 1, or views x frames of a clip."""
    return sample["video"].shape[0] * sample["video"].shape[1] if "video" in sample else 1


def _together(parts: Sequence[Mapping[str, Tensor]], images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """One tensor per map, each part at the upper left, zeros around it."""
    rows = sum(len(next(iter(part.values()))) for part in parts)
    result = {}
    for name, first in parts[0].items():
        maps = [part[name] for part in parts]
        height, width = (max(one.shape[axis] for one in maps) for axis in (2, 3))
        shape = (rows, first.shape[1], height, width)
        out = torch.empty(shape, dtype=dtype, device=images.device)
        at = 0
        for one in maps:
            slot = out[at : at + len(one)]
            if one.shape[2:] != out.shape[2:]:
                slot.zero_()
            slot[:, :, : one.shape[2], : one.shape[3]].copy_(one)
            at += len(one)
        result[name] = out
    return result
