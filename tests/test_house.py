"""The order of floors: every import goes strictly downward, and none has a side effect."""

import ast
import subprocess
import sys
from pathlib import Path

import gemma_mlp

PACKAGE = Path(gemma_mlp.__file__).parent
FLOORS = [
    {"checks", "activations", "op.slices", "testing.oracle"},
    {"dtypes", "mesh", "aot.hlo", "op.cpu"},
    {"config", "aot.compilers"},
    {"params", "aot"},
    {
        "op.backend",
        "op.tpu_blocks",
        "op.gpu_kernels",
        "layouts.layout",
        "layouts.arrays",
        "sharding",
        "testing.samples",
    },
    {"op.xla", "op.tpu_forward", "op.tpu_backward", "op.gpu", "layouts.slots", "layouts.libraries"},
    {"op.vjp", "op.tpu", "layouts.trees"},
    {"op.choose", "layouts", "checkpoint.checks"},
    {"op.api", "checkpoint.loading", "checkpoint.safetensors_folder"},
    {"block", "checkpoint.huggingface", "checkpoint.orbax"},
    {"nnx", "linen", "checkpoint", "testing.stacks"},
]
EMPTY = {"__init__", "op", "testing"}  # packages that hold no names of their own
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    files = (file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py"))
    names = (".".join(file.parts).removesuffix(".__init__") for file in files)
    return [name for name in names if name not in EMPTY]


def imports_of(name):
    path = PACKAGE / name.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
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
