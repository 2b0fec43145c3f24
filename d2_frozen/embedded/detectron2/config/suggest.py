"""All keys of a config, and which of them the user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def iter_entries(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, value) of all entries, inner nodes included: "MODEL", "MODEL.WEIGHTS", ..."""
    for name, value in node.items():
        full = f"{prefix}{name}"
        yield full, value
        if isinstance(value, Mapping):
            yield from iter_entries(value, full + ".")


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the nearest known keys, or "." when none is near."""
    nearest = nearest_keys(key, known)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else "."


def nearest_keys(key: str, known: Iterable[str]) -> list[str]:
    """The known key that resembles ``key`` most, and up to two more that are as near.

    The whole name counts, and so does its last part alone, so that a misplaced SOLVER.MASK_ON finds
    MODEL.MASK_ON. Case does not count.
    """
    wanted = key.upper()
    whole = difflib.SequenceMatcher(b=wanted)
    leaf = difflib.SequenceMatcher(b=wanted.rsplit(".", 1)[-1])
    scores: dict[str, float] = {}
    for candidate in known:
        name = candidate.upper()
        whole.set_seq1(name)
        leaf.set_seq1(name.rsplit(".", 1)[-1])
        similar = whole.ratio()
        scores[candidate] = max(similar, 0.6 * leaf.ratio() + 0.4 * similar)
    best = max(scores.values(), default=0.0)
    if best < 0.75:
        return []
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    return [name for name in ranked if scores[name] > best - 0.02][:3]
