"""The one rule by which two contestants differ: a paired t test over seeds, two-sided, at 5 %.

Equal seeds share data and batches, so what is tested are their differences. With five seeds the limit is 2.78 standard
errors, with three 4.30.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

LEVEL = 0.05


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is not known of one value, or if one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Difference:
    """What one has beyond another, and the interval that holds it with 95 %: ``mean`` ± ``half``."""

    mean: float
    half: float

    @property
    def is_distinguishable(self) -> bool:
        """Whether the interval leaves zero out; one that is not known does not."""
        return abs(self.mean) > self.half

    def written(self, decimals: int, factor: float = 1.0) -> str:
        """Write it with its interval, and say where nothing can be told."""
        if not math.isfinite(self.mean + self.half):
            return "not distinguishable"
        low, high = (f"{factor * (self.mean + side * self.half):.{decimals}f}" for side in (-1, 1))
        if not self.is_distinguishable:
            return f"not distinguishable ({low} to {high})"
        return f"{factor * self.mean:+.{decimals}f} ({low} to {high})"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Return how much more the first has than the second, each a value by seed, over the seeds that both have."""
    seeds = first.keys() & second.keys()
    mean, error = mean_and_error([first[seed] - second[seed] for seed in sorted(seeds)] or [math.nan])
    limit = float(stdtrit(len(seeds) - 1, 1 - LEVEL / 2)) if len(seeds) > 1 else math.inf
    return Difference(mean, limit * error)
