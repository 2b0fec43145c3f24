"""One pass, many heads: models that stand on the same frozen network share it, and what it gave for an image.

In: models with a :class:`FrozenBackbone` inside.  Out: the same models; those with equal backbones hold one object, and
while a :class:`PassMemory` is on, the second model that brings the same image tensor gets the maps of the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2_frozen.backbone.frozen import FrozenBackbone

Maps = dict[str, Tensor]


class PassMemory:
    """Remembers what frozen backbones gave, until it is told to forget.

    Images are compared by value, not by identity: every model makes its own normalised and padded tensor, and where
    two are equal the network has nothing new to do. Comparing costs a thousandth of a pass.

    Attributes:
        passes: calls that ran a network.
        reused: calls that were answered from memory.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.reused = 0
        self._kept: dict[int, list[_Pass]] = {}

    @contextlib.contextmanager
    def on(self, backbones: Iterable[FrozenBackbone]) -> Iterator[PassMemory]:
        """Within, calls of these backbones are remembered; what is remembered outlives it, until :meth:`forget`.

        Raises:
            RuntimeError: a memory is on for one of them already.
        """
        chosen = list({id(backbone): backbone for backbone in backbones}.values())
        taken = next((backbone.name for backbone in chosen if "forward" in backbone.__dict__), None)
        if taken is not None:
            raise RuntimeError(
                f"a PassMemory is on for the backbone {taken} already. Leave its `with` block first; threads that "
                "share a backbone take turns (one Predictor, called from all of them, does that by itself)."
            )
        for backbone in chosen:
            # An attribute of the object hides the class's method, as long as it is there.
            backbone.forward = self._remembering(backbone, backbone.forward)  # type: ignore[method-assign]
        try:
            yield self
        finally:
            for backbone in chosen:
                del backbone.forward  # type: ignore[method-assign]

    def forget(self) -> None:
        """Free all maps: the next images are others."""
        self._kept.clear()

    def _remembering(self, backbone: FrozenBackbone, forward: Callable[[Tensor], Maps]) -> Callable:
        def answer(images: Tensor) -> Maps:
            if backbone.by_sample is not None:
                return forward(images)  # where features are stored there are no pixels that could be compared
            kept = self._kept.setdefault(id(backbone), [])
            dtype = _autocast_dtype(images.device.type)
            for seen in kept:
                if seen.dtype == dtype and seen.untouched() and _equal(seen.images, images):
                    self.reused += 1
                    return {name: _own(feature) for name, feature in seen.maps.items()}
            maps = forward(images)
            self.passes += 1
            given, remembered = _own(images), {name: _own(feature) for name, feature in maps.items()}
            kept.append(_Pass(given, dtype, remembered, _versions([given, *remembered.values()])))
            return dict(maps)

        return answer


class _Pass(NamedTuple):
    images: Tensor
    dtype: Any
    maps: Maps
    versions: list[int]

    def untouched(self) -> bool:
        """A head that wrote into its maps must not change those of the next; nor may the images be others by now."""
        return _versions([self.images, *self.maps.values()]) == self.versions


def share_equal_backbones(models: Sequence[nn.Module], settings: Sequence[Hashable]) -> list[list[int]]:
    """Let models with equal frozen backbones hold the very same one, in place; the others' tensors are freed.

    Equal are those with the same fingerprint, precision, outputs and device, in models with equal ``settings``
    (whatever else changes what the network computes: its part of the config).

    Returns:
        Groups of indices of models that share, in order; a model with nothing frozen, or alone, is a group of one.
    """
    first: dict[Hashable, tuple[int, FrozenBackbone]] = {}
    group_of: list[int] = []
    for index, (model, setting) in enumerate(zip(models, settings)):
        group = index
        for prefix, part in frozen_parts(model).items():
            key = (setting, _identity(part))
            leader, shared = first.setdefault(key, (index, part))
            if shared is not part:
                parent, _, name = prefix.rpartition(".")
                setattr(model.get_submodule(parent), name, shared)
            group = min(group, leader)
        group_of.append(group)
    return [[i for i, g in enumerate(group_of) if g == leader] for leader in sorted(set(group_of))]


def frozen_parts(model: nn.Module) -> dict[str, FrozenBackbone]:
    """Prefix -> each :class:`FrozenBackbone` inside the model, e.g. ``{"backbone.bottom_up": ...}``."""
    return {name: part for name, part in model.named_modules() if isinstance(part, FrozenBackbone)}


def _identity(part: FrozenBackbone) -> Hashable:
    facts = part.fingerprint()
    device = str(next(part.parameters()).device)
    return facts["name"], facts["sha256"], part.precision, tuple(part.output_shape()), device


def _autocast_dtype(device: str) -> Any:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or a copy in inference mode, where nobody counts what is written into one."""
    return tensor.clone() if tensor.is_inference() else tensor


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
