"""A short text and one finished run of train_toy.py, which the tests of that script share."""

import pytest
from byte_decoder import data
from train_toy.run import train

from tests.support import toy


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(data.python_documentation()[:20_000])
    return path


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """(folder, summary) of a run on one device."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(toy.config(workdir, text))
