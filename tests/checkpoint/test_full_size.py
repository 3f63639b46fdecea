"""Layers of Gemma 2 at their real size are written and read back, bit for bit, and the memory of reading is bounded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "MALLOC_MMAP_THRESHOLD_": "1000000",  # glibc returns freed memory, so that the peak counts only memory in use
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
    """2B, because 27B's layers are eight times as large; for them, run `full_size.py FOLDER gemma2_27b 1 ...`."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "full_size.py"), str(folder), "gemma2_2b", "2", way]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


WAYS = [
    "one_device",
    "mesh",
    "stacked",
    "deepmind_stacked",
    "one_chunk",
    "one_chunk_stacked_one_device",
    "maxtext_stacked_one_device",
]


@pytest.mark.parametrize("way", WAYS)
def test_reading_takes_no_more_than_the_largest_tensor(folder, way):
    peak, largest = map(int, full_size(folder, way).split())
    assert peak <= 1.2 * largest
