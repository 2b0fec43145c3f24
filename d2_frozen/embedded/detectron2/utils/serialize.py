"""Send objects to other processes."""

from __future__ import annotations

from typing import Any

__all__ = ["PicklableWrapper"]


class PicklableWrapper:
    """Behaves like the wrapped object, and pickles it with cloudpickle where that is installed.

    So a data set built from a lambda can go to workers that are started with "spawn".
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
        return _unwrap, (cloudpickle.dumps(self._obj),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Reached for unknown names only; _obj itself is unknown while unpickling.
        if name == "_obj":
            raise AttributeError(name)
        return getattr(self._obj, name)


def _unwrap(data: bytes) -> PicklableWrapper:
    """The receiving end. The bytes come from our own parent process, through its pipe."""
    import cloudpickle

    return PicklableWrapper(cloudpickle.loads(data))
