"""Dataset names of one's own: two heads of one process may call different data by the same name.

Detectron2 has one catalog for a process. In a joint run each head gets the catalogs put up as its own while it has its
turn: it registers, loads and evaluates as if it were alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any

from d2_frozen.data import prepare, register
from detectron2.data import DatasetCatalog, MetadataCatalog


class OwnNames:
    """The catalogs as one head sees them; at first, as they are when this is made, without DATASETS.REGISTER's."""

    def __init__(self) -> None:
        by_config = set(register._registered)
        self._own = [
            {name: entry for name, entry in store.items() if name not in by_config} for store in _stores()
        ]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within, the catalogs are the head's; what it registers stays with it."""
        others = [dict(store) for store in _stores()]
        _put(self._own)
        try:
            yield
        finally:
            self._own = [dict(store) for store in _stores()]
            _put(others)


def _stores() -> list[MutableMapping[str, Any]]:
    return [DatasetCatalog.data, MetadataCatalog.data, register._registered, prepare._cleaned]


def _put(contents: list[dict[str, Any]]) -> None:
    for store, content in zip(_stores(), contents):
        store.clear()
        store.update(content)
