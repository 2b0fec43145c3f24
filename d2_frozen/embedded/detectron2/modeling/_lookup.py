"""How does a name in a config become a class? One lookup for every registry of this package.

A name that Detectron2 has and this engine has not is explained; a project may still register its own class
under that name, and then that one is used.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from detectron2._outside import outside_message
from detectron2.utils.registry import Registry


def registered(registry: Registry, name: str, config_key: str, outside: Collection[str] = ()) -> Any:
    """The object that ``registry`` holds under ``name``.

    Args:
        registry: where to look.
        name: value of ``config_key``.
        config_key: only for the message, e.g. ``MODEL.META_ARCHITECTURE``.
        outside: names of Detectron2 itself which this engine does not provide.
    Raises:
        NotImplementedError: ``name`` is one of ``outside`` and nobody registered it.
        KeyError: nobody knows ``name``.
    """
    if name in outside and name not in registry:
        raise NotImplementedError(outside_message(f"{config_key}: {name}"))
    return registry.get(name)


def refuse(cfg_value: bool, feature: str) -> None:
    """Raise NotImplementedError if a config switch asks for ``feature``, which is outside the subset."""
    if cfg_value:
        raise NotImplementedError(outside_message(feature))
