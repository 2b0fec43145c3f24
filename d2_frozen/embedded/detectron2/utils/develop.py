"""Stand-ins for classes and functions whose dependency is missing: they say so when used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = ["create_dummy_class", "create_dummy_func"]


def create_dummy_class(klass: str, dependency: str, message: str = "") -> type:
    """A class named ``klass`` that cannot be made or looked into, for lack of ``dependency``."""

    class _Complaining(type):
        def __getattr__(cls, name: str) -> NoReturn:
            raise ImportError(_lack(klass, dependency, message))

        def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
            raise ImportError(_lack(klass, dependency, message))

    return _Complaining(klass, (), {})


def create_dummy_func(
    func: str, dependency: str | Sequence[str], message: str = ""
) -> Callable[..., NoReturn]:
    """A function named ``func`` that cannot be called, for lack of ``dependency``."""
    needed = dependency if isinstance(dependency, str) else ", ".join(dependency)

    def complain(*args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(_lack(func, needed, message))

    complain.__name__ = func
    return complain


def _lack(what: str, dependency: str, message: str) -> str:
    return f"{what} needs {dependency}, which is not installed. {message}".rstrip()
