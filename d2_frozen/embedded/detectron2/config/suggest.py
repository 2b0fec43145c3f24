"""Which known config key did the user mean?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def iter_keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Full names of all entries, inner nodes included: "MODEL", "MODEL.WEIGHTS", ..."""
    for name, value in node.items():
        full = f"{prefix}{name}"
        yield full
        if isinstance(value, Mapping):
            yield from iter_keys(value, full + ".")


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the nearest known key, or "." when none is near."""
    nearest = nearest_key(key, known)
    return f"; did you mean {nearest}?" if nearest else "."


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The known key that resembles ``key`` most; None if none does.

    The whole name counts, and so does the last part alone, at a discount: SOLVER.MASK_ON is a misplaced
    MODEL.MASK_ON. Case does not count.
    """
    wanted = key.upper()
    leaf = wanted.rsplit(".", 1)[-1]
    matcher, leaf_matcher = difflib.SequenceMatcher(b=wanted), difflib.SequenceMatcher(b=leaf)
    best, best_score = None, 0.75
    for candidate in sorted(known):
        matcher.set_seq1(candidate.upper())
        score = matcher.ratio() if matcher.quick_ratio() > best_score else 0.0
        if "." in candidate:
            leaf_matcher.set_seq1(candidate.upper().rsplit(".", 1)[-1])
            if leaf_matcher.quick_ratio() > best_score:
                # The places are compared too: of two equal last parts the one in the nearer node wins.
                score = max(score, 0.8 * leaf_matcher.ratio() + 0.2 * matcher.ratio())
        if score > best_score:
            best, best_score = candidate, score
    return best
