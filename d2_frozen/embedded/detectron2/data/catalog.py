"""Which dataset does a name stand for, and what is known about it?

``DatasetCatalog``: name -> function that loads the dataset. ``MetadataCatalog``: name -> facts that all
samples share (class names, evaluator, file locations).
"""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

__all__ = ["DatasetCatalog", "Metadata", "MetadataCatalog"]

logger = logging.getLogger(__name__)

# Datasets that Detectron2 itself registers and the embedded engine does not.
_OUTSIDE_PREFIXES = ("lvis_", "voc_", "cityscapes_", "ade20k_")

# Facts by the names that projects of Detectron2's first months use -> their names since.
_FORMER_NAMES = {
    "class_names": "thing_classes",
    "stuff_class_names": "stuff_classes",
    "dataset_id_to_contiguous_id": "thing_dataset_id_to_contiguous_id",
}


def _similar(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


class _DatasetCatalog(UserDict):
    """Name -> function without arguments that returns the dataset as list[dict]."""

    def register(self, name: str, func: Callable[[], Any]) -> None:
        """Give a dataset its name.

        Args:
            name: e.g. "coco_2017_train".
            func: returns the list of dicts; must return the same data whenever it is called.
        Raises:
            AssertionError: ``func`` cannot be called, or the name is taken.
        """
        if not callable(func):
            raise AssertionError(
                f"dataset {name!r}: register a function that returns the data, not {func!r}."
            )
        if name in self.data:
            raise AssertionError(
                f"dataset {name!r} is registered already. Choose another name, or call "
                f"DatasetCatalog.remove({name!r}) first."
            )
        self.data[name] = func

    def get(self, name: str) -> Any:  # type: ignore[override]
        """Load the dataset ``name``, i.e. call its function.

        Raises:
            KeyError: nothing is registered under this name.
        """
        if name not in self.data:
            raise KeyError(_unknown_dataset(name, self.list()))
        return self.data[name]()

    def list(self) -> list[str]:
        """All registered names."""
        return list(self.data)

    def remove(self, name: str) -> None:
        """Forget ``name``. Its metadata stays: see ``MetadataCatalog.remove``."""
        del self.data[name]

    def __str__(self) -> str:
        return f"DatasetCatalog({', '.join(self.data)})"

    __repr__ = __str__


def _unknown_dataset(name: str, known: list[str]) -> str:
    if isinstance(name, str) and (name.startswith(_OUTSIDE_PREFIXES) or "_panoptic" in name):
        from detectron2._outside import outside_message

        return outside_message(f"the predefined dataset {name!r}")
    hint = _similar(str(name), known)
    return f"dataset {name!r} is not registered.{hint} Registered are: {', '.join(known)}"


class Metadata(SimpleNamespace):
    """Facts about one dataset, as attributes that can be set once.

    ``meta.thing_classes = [...]`` sets; setting again is allowed with the same value only, so that two
    parts of a program cannot silently disagree about e.g. the class names.
    """

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        # Reached only for attributes that were never set.
        now = _FORMER_NAMES.get(key)
        if now in self.__dict__:
            logger.warning("The metadata %r is called %r now.", key, now)
            return self.__dict__[now]
        others = sorted(k for k in self.__dict__ if k != "name")
        raise AttributeError(
            f"the metadata of dataset {self.name!r} has no {key!r}. "
            + (
                f"It has: {', '.join(others)}."
                if others
                else "It is empty: is the dataset registered (and spelled right)?"
            )
        )

    def __setattr__(self, key: str, value: Any) -> None:
        key = _FORMER_NAMES.get(key, key)
        unset = object()
        old = self.__dict__.get(key, unset)
        if old is not unset and old != value:
            raise AssertionError(
                f"the metadata {key!r} of dataset {self.name!r} is already set, to another value:\n"
                f"  now: {old!r}\n  new: {value!r}\n"
                f"Use another dataset name, or MetadataCatalog.remove({self.name!r}) first."
            )
        super().__setattr__(key, value)

    def as_dict(self) -> dict[str, Any]:
        """All facts, the name included; a copy."""
        return dict(self.__dict__)

    def set(self, **facts: Any) -> Metadata:
        """Set several facts; returns self."""
        for key, value in facts.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """The fact ``key``, or ``default`` where it is not set."""
        return self.__dict__.get(_FORMER_NAMES.get(key, key), default)


class _MetadataCatalog(UserDict):
    """Name -> :class:`Metadata`, created empty when first asked for."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        """The one Metadata object of the dataset ``name``."""
        if not isinstance(name, str) or not name:
            raise AssertionError(f"a dataset name is a non-empty string, not {name!r}.")
        if name not in self.data:
            self.data[name] = Metadata(name=name)
        return self.data[name]

    def list(self) -> list[str]:
        """All names that have metadata."""
        return list(self.data)

    def remove(self, name: str) -> None:
        """Forget the metadata of ``name``; KeyError where there is none."""
        del self.data[name]

    def __str__(self) -> str:
        return f"MetadataCatalog({', '.join(self.data)})"

    __repr__ = __str__


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
