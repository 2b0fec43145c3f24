"""Is a difference between models larger than what seeds make? A weighted sum of scores, seed by seed, and its interval.

Runs of one seed share the order of the data, and the start of the layers that they have in common, so they are not
independent: the sum is taken within a seed, and its mean over seeds has the interval of Student's t for one sample (the
paired t-test, for any number of models). Seeds that not all models have are left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HOLDS, FAILS, NOISE, NOT_RUN = "holds", "does not hold", "cannot be told from noise", "not run"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A weighted sum of scores, over the seeds that all models have.

    Args:
        mean: NaN where there is no such seed.
        error: standard error; NaN with fewer than two seeds.
        low, high: of the interval; NaN where there is no error.
        seeds: number of seeds that all models have.
        runs: of each model.
    """

    mean: float
    error: float
    low: float
    high: float
    seeds: int
    runs: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """Of the claim that it is above 0."""
        if math.isnan(self.mean):
            return NOT_RUN
        if self.low > 0:
            return HOLDS
        return FAILS if self.high < 0 else NOISE


def difference(weights: Mapping[str, float], scores: Mapping[str, Mapping[int, float]]) -> Difference:
    """
    Args:
        weights: model -> its weight in the sum.
        scores: model -> seed -> score; a model may be missing.
    """
    samples = [(weight, scores.get(model, {})) for model, weight in weights.items()]
    runs = tuple(len(sample) for _, sample in samples)
    shared = set.intersection(*(set(sample) for _, sample in samples))
    sums = [math.fsum(weight * sample[seed] for weight, sample in samples) for seed in sorted(shared)]
    mean = statistics.fmean(sums) if sums else math.nan
    error = standard_error(sums)
    half = error * _quantile(len(sums) - 1) if error > 0 else error  # 0, or NaN
    return Difference(mean, error, mean - half, mean + half, len(sums), runs)


def standard_error(sample: Sequence[float]) -> float:
    """Of the mean; NaN with fewer than two values."""
    return statistics.stdev(sample) / math.sqrt(len(sample)) if len(sample) > 1 else math.nan


def _quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, freedom))


def together(verdicts: Sequence[str]) -> str:
    """Of a claim that consists of several: it holds if all do, and does not hold if one does not."""
    for verdict in (NOT_RUN, FAILS, NOISE):
        if verdict in verdicts:
            return verdict
    return HOLDS if verdicts else NOT_RUN
