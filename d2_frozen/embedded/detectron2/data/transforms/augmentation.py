"""Which random choice becomes which deterministic transform, and how is it applied to an image with its
labels?

An :class:`Augmentation` draws from ``numpy.random`` and answers with a ``Transform``; an
:class:`AugInput` holds the image and the labels that the transform has to move along.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform, TransformList

__all__ = [
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "StandardAugInput",
    "TransformGen",
    "apply_augmentations",
    "apply_transform_gens",
]


class Augmentation:
    """A policy: looks at (parts of) the input, draws, returns the transform to apply.

    A subclass writes ``get_transform(self, image, ...)``; the *names* of its parameters say which attributes
    of the :class:`AugInput` it wants to see, in that order. A single parameter is the image, whatever its
    name: older projects call it ``img``.
    """

    # Attributes of AugInput that get_transform receives; None: read them from its signature at the first
    # call.
    input_args: tuple[str, ...] | None = None

    def _init(self, params: dict[str, Any] | None = None) -> None:
        """Store constructor arguments, usually ``self._init(locals())``, as attributes of the same names."""
        for name, value in (params or {}).items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def get_transform(self, *args: Any) -> Transform:
        """Draw one transform for the given input; to be written by every subclass."""
        raise NotImplementedError(f"{type(self).__name__} has no get_transform().")

    def __call__(self, aug_input: AugInput) -> Transform:
        """Draw a transform, apply it to ``aug_input`` in place, and return it."""
        transform = self.get_transform(*self._wanted_parts(aug_input))
        if not isinstance(transform, Transform):
            raise TypeError(
                f"{type(self).__name__}.get_transform() returned a {type(transform).__name__}, "
                "not a Transform."
            )
        aug_input.transform(transform)
        return transform

    def _wanted_parts(self, aug_input: AugInput) -> list[Any]:
        if self.input_args is None:
            self.input_args = _parameter_names(self)
        parts = []
        for name in self.input_args:
            try:
                parts.append(getattr(aug_input, name))
            except AttributeError as err:
                raise AttributeError(
                    f"{type(self).__name__}.get_transform() asks for {name!r}, "
                    f"but this {type(aug_input).__name__} has no such attribute."
                ) from err
        return parts

    def _rand_range(self, low: float = 1.0, high: float | None = None, size: int | None = None) -> Any:
        """One uniform draw from ``numpy.random``: [0, low) with one argument, [low, high) with two."""
        bounds = (0, low) if high is None else (low, high)
        return np.random.uniform(*bounds, size)

    def __repr__(self) -> str:
        shown = _changed_arguments(self)
        return super().__repr__() if shown is None else f"{type(self).__name__}({', '.join(shown)})"

    __str__ = __repr__


def _parameter_names(augmentation: Augmentation) -> tuple[str, ...]:
    """Names of get_transform's parameters; a single one, ``*args`` too, counts as ``image``."""
    parameters = list(inspect.signature(augmentation.get_transform).parameters.values())
    if len(parameters) == 1:
        return ("image",)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TypeError(
            f"{type(augmentation).__name__}.get_transform() takes *args or **kwargs. Name its parameters "
            "after the AugInput attributes it needs, or set `input_args` on the class."
        )
    return tuple(p.name for p in parameters)


def _changed_arguments(augmentation: Augmentation) -> list[str] | None:
    """``name=value`` of the constructor arguments that are not at their defaults; None where unknown."""
    shown = []
    for name, parameter in inspect.signature(type(augmentation).__init__).parameters.items():
        if name == "self":
            continue
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variadic or not hasattr(augmentation, name):
            return None
        value = getattr(augmentation, name)
        if value is not parameter.default:
            text = repr(value)
            shown.append(f"{name}={text if len(text) < 80 and chr(10) not in text else '...'}")
    return shown


class _FixedAugmentation(Augmentation):
    """A transform that is always the same, seen as a policy without a draw."""

    input_args = ()

    def __init__(self, transform: Transform):
        self.transform = transform

    def get_transform(self, *_: Any) -> Transform:
        # With the inputs when another augmentation, such as RandomApply, hands on its own.
        return self.transform

    def __repr__(self) -> str:
        return repr(self.transform)

    __str__ = __repr__


def _as_augmentation(item: Augmentation | Transform) -> Augmentation:
    if isinstance(item, Augmentation):
        return item
    if isinstance(item, Transform):
        return _FixedAugmentation(item)
    raise TypeError(f"expected an Augmentation or a Transform, not {type(item).__name__}: {item!r}")


class AugmentationList(Augmentation):
    """Augmentations one after the other; each sees what the ones before it have done.

    Calling it gives a flat ``TransformList``.
    """

    def __init__(self, augs: Iterable[Augmentation | Transform]):
        self.augs = [_as_augmentation(item) for item in augs]

    def __call__(self, aug_input: AugInput) -> TransformList:
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(map(repr, self.augs))}]"

    __str__ = __repr__


class AugInput:
    """An image and the labels that move with it.

    Other labels can be transformed afterwards with the transform that was returned, or by a subclass that
    extends :meth:`transform`.

    Args:
        image: (H, W) or (H, W, C), uint8 in 0..255 or float.
        boxes: (N, 4) XYXY in absolute pixels, or None.
        sem_seg: (H, W) integer class map, or None.
    """

    def __init__(
        self, image: np.ndarray, *, boxes: np.ndarray | None = None, sem_seg: np.ndarray | None = None
    ):
        _check_image(image)
        self.image = image
        self.boxes = boxes
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """Apply ``tfm`` to everything held here, in place."""
        moves = {"image": tfm.apply_image, "boxes": tfm.apply_box, "sem_seg": tfm.apply_segmentation}
        for part, move in moves.items():
            value = getattr(self, part)
            if value is not None:
                setattr(self, part, move(value))

    def apply_augmentations(self, augmentations: Iterable[Augmentation | Transform]) -> TransformList:
        """Run the augmentations on this input; same as ``AugmentationList(augmentations)(self)``."""
        return AugmentationList(augmentations)(self)


def _check_image(image: Any) -> None:
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image must be a numpy array (H, W[, C]), not {type(image).__name__}.")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"an image must be uint8 (0..255) or floating point, not {image.dtype}.")
    if image.ndim not in (2, 3):
        raise ValueError(f"an image must have shape (H, W) or (H, W, C), not {image.shape}.")


def apply_augmentations(
    augmentations: Sequence[Augmentation | Transform], inputs: AugInput | np.ndarray
) -> tuple[Any, TransformList]:
    """Run augmentations on an :class:`AugInput`, or on a bare image.

    Returns:
        (the augmented input, of the kind that was given, and the transforms that were applied)
    """
    if isinstance(inputs, np.ndarray):
        holder = AugInput(inputs)
        transforms = holder.apply_augmentations(augmentations)
        return holder.image, transforms
    transforms = inputs.apply_augmentations(augmentations)
    return inputs, transforms


# Names that older Detectron2 projects still import.
TransformGen = Augmentation
StandardAugInput = AugInput
apply_transform_gens = apply_augmentations
