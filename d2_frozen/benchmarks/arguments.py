"""Command lines on which config options (KEY VALUE ...) follow an option that takes several values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def parse_with_lists(
    parser: argparse.ArgumentParser, arguments: Sequence[str], **kinds: Callable[[str], Any]
) -> argparse.Namespace:
    """``parser.parse_args``, where a list ends with the first value that is none of its kind.

    argparse gives an option of ``nargs="+"`` everything up to the next flag: ``--workers 1 2 SEED 3`` would ask for
    SEED workers. What is left over goes to the front of ``opts``.

    Args:
        parser: its list options have no ``type`` and no ``choices``; ``opts`` takes the rest of the line.
        kinds: name of a list option -> text to value, ValueError for a text that is none.
    """
    args = parser.parse_args(arguments)
    for name, kind in kinds.items():
        texts = [str(value) for value in getattr(args, name)]
        values = []
        for text in texts:
            try:
                values.append(kind(text))
            except ValueError:
                break
        if not values:
            parser.error(f"argument --{name.replace('_', '-')}: {texts[0]!r} is no value for it")
        setattr(args, name, values)
        args.opts = [*texts[len(values) :], *args.opts]
    return args


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A kind for ``parse_with_lists``."""

    def kind(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return kind
