"""Every Python block of the README runs as it stands; blocks build on one another, as a reader's session would."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.promotes
@pytest.mark.usefixtures("eight_devices")
def test_python_blocks_run():
    assert len(BLOCKS) >= 4
    session = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), session)


@pytest.mark.parametrize("purpose", ["scripts/train_toy.py", "-m pytest"])
def test_the_two_commands_are_one_line_each_and_begin_with_a_bare_python(purpose):
    (command,) = re.findall(rf"^python3 -m venv \.venv && .*{purpose}$", README, re.MULTILINE)
    assert ".venv/bin/python -m pip install" in command
