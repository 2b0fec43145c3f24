"""What happens when code asks for a part of Detectron2 that the embedded engine does not have.

One sentence, everywhere: the name of the missing feature, and that it needs Detectron2 itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

_INSTALL = "https://detectron2.readthedocs.io/tutorials/install.html"


def outside_message(feature: str) -> str:
    """The text for one missing feature, e.g. ``detectron2.export``."""
    return (
        f"{feature} is outside the subset of Detectron2 that ships inside d2_frozen. "
        f"It needs Detectron2 itself: install it ({_INSTALL}); d2_frozen then uses it by itself."
    )


def outside_subset(module_name: str, names: Iterable[str]) -> Callable[[str], object]:
    """A module-level ``__getattr__`` that explains known names of Detectron2 which are missing here.

    Args:
        module_name: ``__name__`` of the module.
        names: public names that the original has in this place and the embedded engine has not.
    Returns:
        A function for ``__getattr__ = ...``: ImportError for these names, AttributeError for any other.
    """
    known = frozenset(names)

    def __getattr__(name: str) -> object:
        if name in known:
            raise ImportError(outside_message(f"{module_name}.{name}"))
        raise AttributeError(f"module {module_name!r} has no attribute {name!r}")

    return __getattr__


class _MissingModules(importlib.abc.MetaPathFinder):
    """Last finder on ``sys.meta_path``: reached only for ``detectron2.*`` modules that no file provides."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith("detectron2."):
            raise ModuleNotFoundError(outside_message(f"module {fullname}"), name=fullname)
        return None


def explain_missing_modules() -> None:
    """Install the import hook once."""
    if not any(isinstance(finder, _MissingModules) for finder in sys.meta_path):
        sys.meta_path.append(_MissingModules())
