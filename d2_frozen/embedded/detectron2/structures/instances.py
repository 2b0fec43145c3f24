"""Everything known about the objects of one image: named fields of equal length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Instances:
    """Fields such as ``pred_boxes``, ``gt_classes`` or ``scores``, each with one entry per object.

    Set and read them as attributes; a name that starts with "_" is an ordinary attribute, not a field.
    Indexing picks the same objects in every field::

        sure = instances[instances.scores > 0.9]
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any) -> None:
        """
        Args:
            image_size: (height, width) in pixels of the image that the fields refer to.
            kwargs: fields to set.
        """
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width); fixed, as the fields would silently refer to another image."""
        return self._image_size

    def set(self, name: str, value: Any) -> None:
        """Add or replace a field.

        Raises:
            AssertionError: its length is not that of the other fields.
        """
        length = len(value)
        if self._fields:
            assert len(self) == length, (
                f"field {name!r} has {length} entries, but there are {len(self)} instances"
            )
        self._fields[name] = value

    def get(self, name: str) -> Any:
        """The field itself, not a copy. KeyError when there is none of that name."""
        return self._fields[name]

    def has(self, name: str) -> bool:
        return name in self._fields

    def remove(self, name: str) -> None:
        del self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """name -> field; changing the dict changes these instances."""
        return self._fields

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            # image_size is a read-only property; as a field it would have to be one entry per object.
            assert name != "image_size", "Instances.image_size cannot be changed; make new Instances instead"
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are no ordinary attributes. "_fields" itself is missing while
        # unpickling.
        fields = self.__dict__.get("_fields", {})
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise AttributeError(f"Instances have no field {name!r}; fields here: {known}")
        return fields[name]

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        """New instances; ``.to(...)`` is called on every field that has it, others are kept."""
        moved = Instances(self._image_size)
        for name, value in self._fields.items():
            moved._fields[name] = value.to(*args, **kwargs) if hasattr(value, "to") else value
        return moved

    def __getitem__(self, item: int | slice | Tensor | Any) -> Instances:
        """The chosen objects.

        Args:
            item: an integer (gives instances of length 1), or whatever every field can be indexed with.
        Raises:
            IndexError: an integer outside -len .. len-1.
        """
        if type(item) is int:
            count = len(self)
            if not -count <= item < count:
                raise IndexError(f"instance {item} of {count}")
            item = slice(item % count, item % count + 1)
        picked = Instances(self._image_size)
        for name, value in self._fields.items():
            picked.set(name, value[item])
        return picked

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without any field have no length")

    def __iter__(self) -> Iterator:
        raise NotImplementedError("Instances cannot be iterated; index them, or iterate over one field")

    @staticmethod
    def cat(instance_lists: list[Instances]) -> Instances:
        """All objects of several instances of one image.

        Args:
            instance_lists: at least one; same image size and same fields. Tensors, lists, and types with a
                ``cat`` (Boxes, BitMasks ...) can be joined. A single entry is returned as it is.
        Raises:
            AssertionError: nothing to join, something else than Instances, or different image sizes.
            ValueError: a field of a type that cannot be joined.
        """
        assert len(instance_lists) > 0, "Instances.cat: nothing to join"
        assert all(isinstance(i, Instances) for i in instance_lists), (
            "Instances.cat: every entry must be Instances"
        )
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        sizes = {tuple(i.image_size) for i in instance_lists}
        assert len(sizes) == 1, (
            f"Instances.cat: the entries belong to images of different sizes {sorted(sizes)}"
        )
        joined = Instances(first.image_size)
        for name in first._fields:
            joined.set(name, _join(name, [i.get(name) for i in instance_lists]))
        return joined

    def __str__(self) -> str:
        height, width = self._image_size
        shown = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        count = len(self) if self._fields else 0
        return (
            f"Instances(num_instances={count}, image_height={height}, image_width={width}, fields=[{shown}])"
        )

    __repr__ = __str__


def _join(name: str, parts: list[Any]) -> Any:
    kind = type(parts[0])
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=0)
    if isinstance(parts[0], list):
        return list(itertools.chain.from_iterable(parts))
    if hasattr(kind, "cat"):
        return kind.cat(parts)
    raise ValueError(f"field {name!r} holds {kind.__name__}, which Instances.cat cannot join")
