"""Means over seeds, with Student's t confidence intervals."""

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def interval(values, comparisons: int = 1) -> tuple[float, float]:
    """Returns (mean, half the width of its 95 % confidence interval). The values must be independent and about normal.

    With several `comparisons` the interval is wider (Bonferroni): all of them hold at once with 95 % confidence.
    """
    values = np.asarray(values, float)
    quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / comparisons, len(values) - 1)
    return float(values.mean()), float(quantile * stats.sem(values))


def paired(values, reference, comparisons: int = 1) -> tuple[float, float]:
    """The `interval` of the differences values - reference, taken seed by seed."""
    return interval(np.subtract(values, reference), comparisons)
