"""What decides which tests run (the subsets of tests/support/vary.py, the sets of tests/conftest.py), and the disk.

The disk of tests/support/disk.py finds what each writer that leaves out a step may lose.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.disk import check_every_crash
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


OLD, NEW = "some old text", "all new words"


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_by_steps(path, steps):
    """Every step is a call of the writer of `path`; the steps are those of a safe writer, or fewer, or in disorder."""
    for step in steps.split(", "):
        if step == "aside":
            path.with_name("aside").write_text(NEW)
        elif step == "in place":
            path.write_text(NEW)
        elif step == "sync aside":
            sync(path.with_name("aside"))
        elif step == "sync file":
            sync(path)
        elif step == "remove":
            path.unlink()
        elif step == "rename":
            os.replace(path.with_name("aside"), path)
        else:
            sync(path.parent)


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ("aside, sync aside, rename, sync folder", None),
        ("aside, sync aside, sync folder, rename, sync folder", None),
        ("aside, rename, sync folder", "leaves file 0,"),  # the name before the content
        ("aside, rename, sync file, sync folder", "leaves file 0,"),
        ("aside, sync aside, rename", "after the writer had returned .* reads 'some old text'"),
        ("in place, sync file, sync folder", "reads 'all ne"),  # a mixture
        ("aside, sync aside, remove, rename, sync folder", "reads None"),
        ("aside, sync aside, remove, sync folder, rename, sync folder", "reads None"),
    ],
)
def test_the_disk_loses_what_is_not_synced(tmp_path, steps, found):
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text(OLD)

    def read(folder):
        return (folder / "file").read_text() if (folder / "file").exists() else None

    def check():
        write = lambda: write_by_steps(root / "file", steps)  # noqa: E731
        check_every_crash(root, tmp_path / "states", write, read, OLD, NEW)

    if found is None:
        check()
        return
    with pytest.raises(AssertionError, match=found):
        check()
