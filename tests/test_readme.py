"""Every Python block of every README runs as it stands.

The blocks of one README build on one another, as a reader's session would, and start with nothing defined.
"""

import re

import pytest

from tests.support.readme import ROOT, blocks

READMES = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("README.md"))]
READMES = [path for path in READMES if not path.parts[0].startswith(".")]  # such as .venv


def cases():
    for path in filter(blocks, READMES):
        on_eight = any("# of eight devices" in block for block in blocks(path))
        yield pytest.param(path, marks=pytest.mark.eight_devices if on_eight else ())


@pytest.mark.promotes
@pytest.mark.parametrize("path", list(cases()), ids=str)
def test_python_blocks_run(path):
    session = {}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), session)


def test_the_main_readme_has_blocks():
    assert len(blocks("README.md")) >= 4


@pytest.mark.parametrize("purpose", ["scripts/train_toy.py", "-m pytest -n 2"])
def test_the_two_commands_are_one_line_each_and_begin_with_a_bare_python(purpose):
    (command,) = re.findall(rf"^python3 -m venv \.venv && .*{purpose}$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert ".venv/bin/python -m pip install" in command
