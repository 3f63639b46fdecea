"""A short text and one finished run of train_toy.py, which the tests of that script share."""

import jax
import pytest
from byte_decoder import data
from jax.experimental.compilation_cache import compilation_cache
from train_toy.run import train

from tests.scripts import toy


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Runs, and the processes that they start, take programs that an earlier run compiled from a folder."""
    folder = str(tmp_path_factory.getbasetemp() / "compiled")
    settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX asks for the folder once
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(data.python_documentation()[:20_000])
    return path


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """(folder, summary) of a run on one device."""
    workdir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir.parent)  # Orbax takes no relative paths, but people give them
        return workdir, train(toy.config(workdir.name, text))
