"""Parametrized tests of which a few cases run by default and all with `pytest -m ""`."""

import itertools

import pytest


def vary(names, rows, together="", indirect=()):
    """`pytest.mark.parametrize(names, rows)` with all rows marked slow except a covering subset.

    The subset has each value of each factor at least once. For the factors named in `together` it has each pair of
    values that some row has. For instance `vary("save dtype remat", itertools.product(SAVES, DTYPES, (False, True)),
    together="save dtype")` runs each save with each dtype, some with remat and some without.
    """
    names, rows = names.split(), list(rows)
    quick = covering(rows, [names.index(name) for name in together.split()])
    marks = [() if i in quick else pytest.mark.slow for i in range(len(rows))]
    params = [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks)]
    return pytest.mark.parametrize(names, params, ids=str, indirect=indirect)


def first_is_quick(values):
    """Marks all values except the first as slow. It is for tests whose cases are much alike and take long."""
    return [pytest.param(value, marks=pytest.mark.slow if i else ()) for i, value in enumerate(values)]


def slow_except(quick, values):
    """Marks all values as slow except those in `quick`."""
    return [value if value in quick else slow(value) for value in values]


def slow(*values):
    """A case of `pytest.mark.parametrize` that is marked as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def covering(rows, together):
    """The indices of a small subset of rows with each value of each column, and each pair of the columns `together`.

    It takes the row that adds the most values and pairs, until none is missing.
    """

    def values(row):
        entries = [(column, str(value)) for column, value in enumerate(row)]
        pairs = itertools.combinations([entries[column] for column in together], 2)
        return {*entries, *pairs}

    covered = [values(row) for row in rows]
    missing, chosen = set().union(*covered), []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(covered[i] & missing))
        missing -= covered[best]
        chosen.append(best)
    return chosen
