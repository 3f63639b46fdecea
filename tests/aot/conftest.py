"""The compilers run on a CPU machine; without them these tests say that they skip."""

from importlib import metadata

import pytest


@pytest.fixture(autouse=True)
def compilers():
    for package in ("libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"the aot extra is not installed: no {package}")
