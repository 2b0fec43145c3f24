"""How are faults in the data told? Collected, counted, and raised as one error or logged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN = 10


@dataclass(frozen=True)
class Problem:
    """One fault.

    kind: what is wrong, in words that are equal for equal faults, so that they can be counted.
    where: dataset, file, image id, annotation id.
    seen: the offending value; "" if the kind says it all.
    skippable: is the rest of the data fine without this record?
    """

    kind: str
    where: str
    seen: str = ""
    skippable: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}" + (f" ({self.seen})" if self.seen else "")


class BadDataError(ValueError):
    """Data that cannot be used; the text lists the first problems and counts all of them."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        advice = "Correct the data"
        if all(problem.skippable for problem in problems):
            advice += ", or set DATASETS.SKIP_BAD True to leave these records out"
        super().__init__(f"{describe(problems)}\n{advice}.")

    def __reduce__(self):
        return type(self), (self.problems,)


def describe(problems: Sequence[Problem]) -> str:
    """Counts per kind, then the first problems; faults that cannot be skipped come first."""
    ordered = sorted(problems, key=lambda problem: problem.skippable)
    counts = Counter(problem.kind for problem in ordered)
    lines = [f"{len(problems)} problem{'s' * (len(problems) != 1)} in the data:"]
    lines += [f"  {count} x {kind}" for kind, count in counts.most_common()]
    lines.append(f"The first {_SHOWN}:" if len(problems) > _SHOWN else "Namely:")
    lines += [f"  {problem}" for problem in ordered[:_SHOWN]]
    return "\n".join(lines)
