"""Layers of Gemma 2 at their real size: there and back bit for bit, and what memory a sharded load takes."""

import shutil
import sys

import pytest

from tests.checkpoint.test_mesh import run

ENVIRONMENT = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "MALLOC_MMAP_THRESHOLD_": "1000000",  # glibc gives back what is freed: the peak is of what is in use
}
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_size")
    full_size(folder, "write")
    yield folder
    shutil.rmtree(folder)


def full_size(folder, way):
    """27B's layers are eight times the size of 2B's; `full_size.py FOLDER gemma2_27b 1 ...` does them by hand."""
    return run("full_size.py", folder, "gemma2_2b", 2, way, **ENVIRONMENT)


WAYS = [
    "one_device",
    "mesh",
    "stacked",
    "stacked_one_device",
    "deepmind",
    "deepmind_stacked",
    "one_chunk",
    "one_chunk_stacked",
    "one_chunk_stacked_one_device",
    "maxtext",
    "maxtext_stacked_one_device",
]


@pytest.mark.parametrize("way", WAYS)
def test_there_and_back_within_the_largest_tensor(folder, way):
    peak, largest = map(int, full_size(folder, way).split())
    assert peak <= 1.2 * largest
