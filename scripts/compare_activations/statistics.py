"""Means over seeds with Student's t intervals."""

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def interval(values, comparisons: int = 1) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval), for independent and about normal `values`.

    With several `comparisons` the interval is Bonferroni's: all of them hold together with 95 % confidence.
    """
    values = np.asarray(values, float)
    quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / comparisons, len(values) - 1)
    return float(values.mean()), float(quantile * stats.sem(values))


def paired(values, reference, comparisons: int = 1) -> tuple[float, float]:
    """`interval` of values - reference, seed by seed."""
    return interval(np.subtract(values, reference), comparisons)
