"""What decides which tests run: the subsets of tests/support/vary.py and the sets of tests/conftest.py."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.vary import covering, first_is_quick, vary

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


@pytest.mark.parametrize("options", first_is_quick([(), ("-n", "2")]))
def test_a_set_whose_package_is_missing_is_named_and_does_not_pass(options, tmp_path):
    conftest = (Path(__file__).parent / "conftest.py").read_text()
    assert '"torch"' in conftest
    (tmp_path / "conftest.py").write_text(conftest.replace('"torch"', '"no-such-package"'))
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["needs_peers", "slow"]\n')
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n@pytest.mark.needs_peers\n@pytest.mark.parametrize('number', range(3))\n"
        "def test_it(number): raise AssertionError\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "NOT RUN (3): tests that need PyTorch and transformers: pip install torch" in done.stdout
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "NOT RUN (3)" in done.stdout and "1 passed" in done.stdout and done.returncode == 0
