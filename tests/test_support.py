"""The helpers that decide what the other tests run."""

import itertools

from tests.support.vary import covering, vary

ROWS = list(itertools.product("abcd", (1, 2, 3), (False, True), ({}, {"x": 1})))


def test_each_value_is_there_once():
    quick = [ROWS[i] for i in covering(ROWS, [])]
    assert len(quick) == 4
    for column in range(4):
        assert all(any(row[column] == value for row in quick) for value in [row[column] for row in ROWS])


def test_each_pair_of_factors_that_interact_is_there():
    quick = [ROWS[i] for i in covering(ROWS, [0, 1, 3])]
    assert len(quick) == 12
    for first, second in itertools.combinations((0, 1, 3), 2):
        pairs = [(row[first], row[second]) for row in quick]
        assert all((row[first], row[second]) in pairs for row in ROWS)


def test_only_rows_that_are_given_are_asked_for():
    assert covering([("a", 1), ("b", 1), ("a", 2)], [0, 1]) == [0, 1, 2]


def test_all_other_rows_are_slow_and_none_is_lost():
    names, params = vary("letter number flag options", ROWS, together="letter flag").mark.args
    assert names == ["letter", "number", "flag", "options"]
    assert [param.values for param in params] == ROWS
    marks = [[mark.name for mark in param.marks] for param in params]
    assert marks.count([]) == 8 and marks.count(["slow"]) == len(ROWS) - 8
