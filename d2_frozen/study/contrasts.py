"""Is a difference between models larger than what seeds make? A weighted sum of means over seeds, and its interval.

The standard error is that of independent runs. The interval is Student's t with Welch's degrees of freedom, in the form
for any number of means (Satterthwaite, "An approximate distribution of estimates of variance components", 1946).
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
    """A weighted sum of means.

    Args:
        mean: NaN where a model has no run.
        error: standard error; NaN where a model has fewer than two seeds.
        low, high: of the interval; NaN where there is no error.
        runs: of each model.
    """

    mean: float
    error: float
    low: float
    high: float
    runs: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """Of the claim that it is above 0."""
        if math.isnan(self.mean):
            return NOT_RUN
        if self.low > 0:
            return HOLDS
        return FAILS if self.high < 0 else NOISE


def difference(weights: Mapping[str, float], values: Mapping[str, Sequence[float]]) -> Difference:
    """
    Args:
        weights: model -> its weight in the sum.
        values: model -> scores, one per seed; a model may be missing.
    """
    samples = [(weight, values.get(model, ())) for model, weight in weights.items()]
    runs = tuple(len(sample) for _, sample in samples)
    nan = math.nan
    if not all(runs):
        return Difference(nan, nan, nan, nan, runs)
    mean = math.fsum(weight * statistics.fmean(sample) for weight, sample in samples)
    if min(runs) < 2:
        return Difference(mean, nan, nan, nan, runs)
    variances = [weight**2 * statistics.variance(sample) / len(sample) for weight, sample in samples]
    error = math.sqrt(math.fsum(variances))
    half = error * _quantile(variances, runs) if error else 0.0
    return Difference(mean, error, mean - half, mean + half, runs)


def _quantile(variances: Sequence[float], runs: Sequence[int]) -> float:
    from scipy.stats import t

    freedom = math.fsum(variances) ** 2 / math.fsum(v**2 / (n - 1) for v, n in zip(variances, runs))
    return float(t.ppf(0.5 + CONFIDENCE / 2, freedom))


def together(verdicts: Sequence[str]) -> str:
    """Of a claim that consists of several: it holds if all do, and does not hold if one does not."""
    for verdict in (NOT_RUN, FAILS, NOISE):
        if verdict in verdicts:
            return verdict
    return HOLDS if verdicts else NOT_RUN
