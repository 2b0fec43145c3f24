"""A frozen backbone that answers sample by sample: from stored features where a sample brings them, else by running.

In: a batch of images, and the samples it was made of.  Out: maps by name, as the backbone gives them, put together.

Each sample is computed by itself, padded as if it were alone, and its maps are then padded with zeros to those of the
batch. So what a sample's features are does not depend on what else is in the batch, nor, bit for bit, on whether they
were computed now or read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2_frozen.caching import FEATURES, SLOT, FeatureCache

Compute = Callable[[Tensor], Mapping[str, Tensor]]
Sample = Mapping[str, Any]


class SampleFeatures:
    """Set it as ``FrozenBackbone.by_sample``, and call :meth:`watch` on the model around it.

    Args:
        cache: stores what is computed; None computes all, sample by sample.
        names: the maps that the neck or head takes; others are left out. All if None.
    """

    def __init__(self, cache: FeatureCache | None = None, names: Sequence[str] | None = None) -> None:
        self.cache = cache
        self.names = None if names is None else tuple(names)
        self._samples: list[Sample] = []
        self._next = 0
        # Of the next sample: how many of its images came already, and what was computed of them.
        self._row = 0
        self._begun: list[Mapping[str, Tensor]] = []
        self._padded_hw: Callable[[Sample], tuple[int, int]] = lambda sample: tuple(
            sample["image"].shape[-2:]
        )

    @property
    def announced(self) -> bool:
        """Is there a batch whose images will come?"""
        return self._next < len(self._samples)

    def watch(self, model: nn.Module) -> None:
        """Let the model announce each training batch, a list of samples, when it is called."""
        padded_hw = padded_hw_of(model)

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.announce(arguments[0] if module.training else [], padded_hw)

        def after(*_: Any) -> None:
            self.announce([])

        model.register_forward_pre_hook(before)
        model.register_forward_hook(after, always_call=True)

    def announce(
        self, samples: Sequence[Sample], padded_hw: Callable[[Sample], tuple[int, int]] | None = None
    ) -> None:
        """The next images are those of these samples, in this order.

        Args:
            padded_hw: height and width to which a sample's image is padded when it is alone.
        """
        self._samples, self._next, self._row, self._begun = list(samples), 0, 0, []
        if padded_hw is not None:
            self._padded_hw = padded_hw

    def __call__(self, images: Tensor, compute: Compute, dtype: torch.dtype) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images -> maps of B rows in ``dtype``. A batch may come in several calls.

        Raises:
            ValueError: there are more images than the samples have.
        """
        parts: list[Mapping[str, Tensor]] = []
        at = 0
        while at < len(images):
            if not self.announced:
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


def padded_hw_of(model: nn.Module) -> Callable[[Sample], tuple[int, int]]:
    """For a model with ``preprocess_image``: to which height and width is the image of a sample padded alone?"""
    sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def padded_hw(sample: Sample) -> tuple[int, int]:
        own = tuple(sample["image"].shape[-2:])
        if own not in sizes:
            sizes[own] = tuple(model.preprocess_image([sample]).tensor.shape[-2:])  # type: ignore[operator]
        return sizes[own]

    return padded_hw


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
