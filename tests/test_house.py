"""The order of floors: every import goes strictly downward, and none has a side effect."""

import ast
import subprocess
import sys
from pathlib import Path

import gemma_mlp

PACKAGE = Path(gemma_mlp.__file__).parent
FLOORS = [
    {"checks", "activations", "kernels.device"},
    {"dtypes", "axes", "hlo", "safetensors_folder"},
    {"config", "aot"},
    {"params", "rms_norm", "kernels.products"},
    {"trees", "sharding", "kernels.pallas_tpu", "kernels.pallas_gpu", "kernels.split"},
    {"kernels.pallas_tpu_gradients"},
    {"kernels.pallas"},
    {"kernels.xla"},
    {"feed_forward", "layouts", "loading"},
    {"block", "hf_checkpoint", "orbax_checkpoint"},
    {"nnx", "linen", "checkpoint"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    files = (file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py"))
    return [".".join(file.parts) for file in files if file.name != "__init__"]


def imports_of(name):
    tree = ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemma_mlp":
            module = (node.module or "").removeprefix("gemma_mlp").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if inner in FLOOR else module


def test_every_module_has_a_floor():
    assert set(modules()) == set(FLOOR)


def test_imports_go_strictly_downward():
    for name in modules():
        for imported in imports_of(name):
            assert FLOOR[imported] < FLOOR[name], f"{name} imports {imported}"


def test_importing_initialises_no_backend_and_says_nothing():
    code = "import gemma_mlp; from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_are_there():
    assert all(hasattr(gemma_mlp, name) for name in gemma_mlp.__all__)
    assert (PACKAGE / "py.typed").exists()
