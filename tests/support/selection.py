"""Which cases of a test belong to the quick run."""

import pytest


def slow_except(quick, names):
    """Parameters for `pytest.mark.parametrize`: `names`, all marked slow except those in `quick`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
