"""Send objects to other processes."""

from __future__ import annotations

import pickle
from typing import Any

__all__ = ["PicklableWrapper"]


class PicklableWrapper:
    """Behaves like the wrapped object, and can be pickled even where that cannot: lambdas and local functions too.

    What pickle alone cannot do needs the package cloudpickle; without it pickle's limits hold.
    """

    def __init__(self, obj: Any) -> None:
        while isinstance(obj, PicklableWrapper):
            obj = obj._obj
        self._obj = obj

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            import cloudpickle
        except ImportError:
            return PicklableWrapper, (self._obj,)
        return _unwrapped, (cloudpickle.dumps(self._obj),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Reached for unknown names only; _obj itself is unknown while unpickling.
        if name == "_obj":
            raise AttributeError(name)
        return getattr(self._obj, name)


def _unwrapped(content: bytes) -> PicklableWrapper:
    # Part of a pickle that is being read already: it can do nothing that the outer one could not.
    return PicklableWrapper(pickle.loads(content))
