"""Send objects to other processes."""

from __future__ import annotations

from typing import Any

__all__ = ["PicklableWrapper"]


class PicklableWrapper:
    """Behaves like the wrapped object. Kept for code that expects it: pickle's own limits hold, so no
    lambdas.
    """

    def __init__(self, obj: Any) -> None:
        while isinstance(obj, PicklableWrapper):
            obj = obj._obj
        self._obj = obj

    def __reduce__(self) -> tuple[Any, ...]:
        return PicklableWrapper, (self._obj,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Reached for unknown names only; _obj itself is unknown while unpickling.
        if name == "_obj":
            raise AttributeError(name)
        return getattr(self._obj, name)
