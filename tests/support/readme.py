"""The Python blocks of the READMEs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(path):
    """Those of the README at a path from the project's root."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)
