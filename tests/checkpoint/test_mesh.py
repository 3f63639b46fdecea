"""Straight onto a mesh of eight devices, which takes a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script, *arguments, **environment):
    command = [sys.executable, str(ROOT / "tests" / "support" / script), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lists_and_stacks_of_every_form(tmp_path):
    assert run("mesh_loading.py", tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8").endswith("ok\n")
