"""Compares contestants by a score. Some seeds choose each learning rate, and other seeds compare at that rate."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compare_activations.contestants import REFERENCE
from compare_activations.ensembles import Member, numbers
from compare_activations.ledger import Ledger, Run
from compare_activations.statistics import interval, paired


def compare(
    evaluate: Callable[[Sequence[Member]], Sequence[float]],
    ledger: Ledger,
    *,
    learning_rates: Sequence[float],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
    **key: Any,
) -> None:
    """Records two runs in the ledger: the tuning of the learning rate and the comparison.

    Args:
      evaluate: trains members from scratch and returns the score of each. Less is better.
      ledger: the record of all runs.
      learning_rates: the grid, the same for every contestant.
      tuning_seeds: the seeds whose mean score chooses a rate from the grid.
      seeds: the seeds that are compared, at the chosen rate.
      **key: the fields that name both runs in the ledger, in addition to `part`.
    """

    def scored(members):
        rates = [member.learning_rate for member in members]
        return {"seeds": [m.seed for m in members], "learning_rates": rates, "scores": numbers(evaluate(members))}

    grid = [Member(seed, rate) for rate in learning_rates for seed in tuning_seeds]
    tuned = ledger.run(functools.partial(scored, grid), **key, part="tuning")
    rate = best_rate(tuned)
    ledger.run(functools.partial(scored, [Member(seed, rate) for seed in seeds]), **key, part="comparison")


def best_rate(tuned: Run) -> float:
    """The learning rate with the least mean score. A rate at which any seed diverged is never chosen."""
    rates = np.array(tuned["learning_rates"])
    scores = np.array([np.inf if score is None else score for score in tuned["scores"]])
    return float(min(dict.fromkeys(rates.tolist()), key=lambda rate: scores[rates == rate].mean()))


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each contestant: the mean with its 95 % interval, and the paired difference from REFERENCE.

    The intervals of all the differences hold at once with 95 % confidence (Bonferroni).
    """
    compared = {run["contestant"]: run for run in runs if run["part"] == "comparison"}
    table = []
    for name, run in compared.items():
        mean, half = interval(run["scores"])
        row = {"contestant": name, "learning_rate": run["learning_rates"][0], "mean": mean, "half": half}
        if name != REFERENCE and REFERENCE in compared:
            reference = compared[REFERENCE]
            assert run["seeds"] == reference["seeds"]
            difference, half = paired(run["scores"], reference["scores"], len(compared) - 1)
            row |= {"difference": difference, "difference_half": half}
        table.append(row)
    return table
