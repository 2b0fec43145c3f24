"""Names of feature maps, and which of them are meant.

``module`` is the output of a module of the model, ``module:input`` what it is called with; ``[p3]`` or ``[0]`` behind
it is an item of a dict or list, ``#1`` its second call in one forward pass, ``#2`` the third, and so on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

INPUT = ":input"


def tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors of at least two dimensions in nested dicts, lists and tuples, with their names."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim >= 2:
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{name}[{key}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{name}[{i}]")


def tensors_in_arguments(
    arguments: tuple[Any, ...], by_name: Mapping[str, Any], name: str
) -> Iterator[tuple[str, Tensor]]:
    """As :func:`tensors_in`, for a call; a single argument stands for itself."""
    if len(arguments) + len(by_name) == 1:
        yield from tensors_in((*arguments, *by_name.values())[0], name)
    else:
        yield from tensors_in(arguments, name)
        yield from tensors_in(by_name, name)


def matcher(glob: str) -> Callable[[str], bool]:
    """Does a name fit? ``*`` stands for any characters, ``?`` for one, brackets for themselves.

    Inputs are meant only where the glob says ``:input``.
    """
    fits = re.compile(re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".")).fullmatch
    inputs = INPUT in glob
    return lambda name: (inputs or INPUT not in name) and fits(name) is not None


def matching(glob: str, names: Iterable[str]) -> list[str]:
    """Names that fit, in their order.

    Raises:
        ValueError: none does; with the nearest ones.
    """
    names = list(names)
    fits = matcher(glob)
    found = [name for name in names if fits(name)]
    if not found:
        raise ValueError(
            f"no feature map fits {glob!r}. Nearest: {', '.join(nearest(glob, names))}. "
            "`study cka --list` prints the names of a model."
        )
    return found


def nearest(glob: str, names: Sequence[str], count: int = 5) -> list[str]:
    """Names most like ``glob`` without its wildcards."""
    text = glob.replace("*", "").replace("?", "")
    if INPUT not in glob:
        names = [name for name in names if INPUT not in name]
    return difflib.get_close_matches(text, names, n=count, cutoff=0.0)
