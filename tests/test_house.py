"""The rules of this repository: what imports what, names, sizes of files, and no side effect of an import."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import gemma_mlp
from gemma_mlp.op.choose import KERNELS

PACKAGE = Path(gemma_mlp.__file__).parent
ROOT = Path(__file__).parents[1]
FLOORS = [
    {"checks", "disk", "activations", "op.slices", "testing.oracle"},
    {"dtypes", "mesh", "aot.hlo"},
    {"weights", "aot.compilers", "op.cpu", "layouts.arrays"},
    {"config", "aot"},
    {"params"},
    {"quantization"},
    {"adapters", "op.backend", "op.tpu_blocks", "op.gpu_kernels", "layouts.layout", "layouts.quantized", "sharding"},
    {"op.matmuls", "op.tpu_forward", "op.tpu_backward", "op.gpu", "layouts.libraries", "layouts.trees"},
    {"op.xla", "layouts.adapters"},
    {"op.vjp", "op.tpu", "layouts"},
    {"op.choose"},
    {"op.api", "nnx_weights", "checkpoint.addresses", "checkpoint.loading", "checkpoint.safetensors_folder"},
    {"adopt", "block", "nnx_convert", "checkpoint.config_json", "checkpoint.low_bit"},
    {"checkpoint.orbax", "checkpoint.peft_adapters", "checkpoint.compressed", "checkpoint.gguf_file"},
    {"nnx", "linen", "checkpoint.huggingface", "testing.stacks"},
    {"checkpoint"},
]
EMPTY = {"__init__", "op", "testing"}  # packages that hold no names of their own
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    files = (file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py"))
    names = (".".join(file.parts).removesuffix(".__init__") for file in files)
    return [name for name in names if name not in EMPTY]


def imports_in(path):
    """Yields (module, name) for each `from module import name`, and (module, "") for each `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def imports_of(name):
    path = PACKAGE / name.replace(".", "/")
    for module, imported in imports_in(path / "__init__.py" if path.is_dir() else path.with_suffix(".py")):
        if module.split(".")[0] == "gemma_mlp":
            module = module.removeprefix("gemma_mlp").removeprefix(".")
            inner = f"{module}.{imported}".removeprefix(".")
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


def test_importing_loads_no_pallas_and_no_checkpoint_library():
    """They take longer to import than the package does, and few programs need them."""
    code = """
import gemma_mlp, sys
print(*{"jax.experimental.pallas", "orbax.checkpoint", "tensorstore"} & set(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_public_names_are_there():
    for name in modules():
        module = importlib.import_module(f"gemma_mlp.{name}".removesuffix("."))
        assert all(hasattr(module, public) for public in getattr(module, "__all__", ())), name
    assert all(hasattr(gemma_mlp, name) for name in gemma_mlp.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_no_public_name_hides_a_module_of_its_package():
    """Otherwise `import gemma_mlp.x as x` gives the function x instead of the module."""
    subpackages = [name for _, name, is_package in pkgutil.iter_modules([str(PACKAGE)]) if is_package]
    for package in (gemma_mlp, *(importlib.import_module(f"gemma_mlp.{name}") for name in subpackages)):
        submodules = {name for _, name, _ in pkgutil.iter_modules(package.__path__)}
        for name in submodules.intersection(dir(package)):
            assert getattr(package, name) is importlib.import_module(f"{package.__name__}.{name}"), name


def test_no_file_of_the_package_is_long():
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {name: number for name, number in lines.items() if number > 300}


def test_no_code_asks_for_a_backends_name():
    """It asks the backend for a function instead, so that a new backend is one new value."""
    comparison = re.compile(rf'(kernels|backend|platform)\w* *(==|!=) *"({"|".join(KERNELS)})"')
    found = [path.name for path in PACKAGE.rglob("*.py") if comparison.search(path.read_text())]
    assert not found


def test_tests_import_no_other_test():
    for path in (ROOT / "tests").rglob("*.py"):
        for module, name in imports_in(path):
            imported = f"{module}.{name}".split(".")
            assert imported[0] != "tests" or not any(part.startswith("test_") for part in imported), path


def test_tests_and_scripts_are_apart():
    """Scripts import no test, and only the tests of scripts import scripts."""
    scripts = {path.stem for path in (ROOT / "scripts").iterdir()}
    for path in (ROOT / "scripts").rglob("*.py"):
        assert not any(module.split(".")[0] == "tests" for module, _ in imports_in(path)), path
    for path in set((ROOT / "tests").rglob("*.py")) - set((ROOT / "tests" / "scripts").rglob("*.py")):
        assert not any(module.split(".")[0] in {"scripts", *scripts} for module, _ in imports_in(path)), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000
