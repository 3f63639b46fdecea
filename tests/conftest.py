"""Settings for every test: strict JAX, eight CPU devices, and sets of tests that run only if their needs are installed.

JAX runs with full float32 matmuls (TPUs round them otherwise) and without implicit promotion. The CPU counts as eight
devices, for the tests of meshes. All other tests run on the first device.

Hypothesis tries 30 examples for each test in the quick run, and 300 if slow tests are selected too. They are always the
same.

A test of one of SETS is left out if what it needs is missing. The run's last lines say how many tests were left out,
and how to install what they need.
"""

from importlib import metadata

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")  # here, so that fixtures of modules have it too

SETS = {  # marker or fixture: (what its tests need, the packages of that, how to get it)
    "needs_compilers": (
        "the compilers for TPUs and the H200",
        ("libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"),
        "pip install -e '.[aot]'",
    ),
    "needs_peers": (
        "PyTorch and transformers",
        ("torch", "transformers", "peft", "compressed-tensors"),
        "pip install torch -e '.[peers]'",
    ),
    "needs_onnx": ("jax2onnx and onnxruntime", ("jax2onnx", "onnxruntime"), "see tests/README.md"),
    "needs_tunix": ("Tunix", ("google-tunix",), "see tests/README.md"),
    "needs_deepmind": ("DeepMind's gemma", ("gemma",), "see tests/README.md"),
    "eight_devices": ("eight devices", (), "a CPU counts as eight, JAX_PLATFORMS=cpu"),
    "needs_cpu": ("a CPU as JAX's default device", (), "JAX_PLATFORMS=cpu"),
}
LACKING = {  # of what no package brings
    "eight_devices": lambda: jax.device_count() != 8,
    "needs_cpu": lambda: jax.default_backend() != "cpu",
}
NOT_RUN = pytest.StashKey[dict[str, int]]()  # the number of tests of each set, and of slow tests, that were left out


def is_missing(package):
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return True
    return False


def pytest_configure(config):
    config.stash[NOT_RUN] = dict.fromkeys((*SETS, "slow"), 0)
    for name, examples in (("quick", 30), ("full", 300)):
        hypothesis.settings.register_profile(name, max_examples=examples, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("quick" if "not slow" in config.option.markexpr else "full")


@pytest.hookimpl(trylast=True)  # after -k and -m, so that only tests that would have run are counted
def pytest_collection_modifyitems(config, items):
    for name, (_, packages, _) in SETS.items():
        needing = {item for item in items if item.get_closest_marker(name) or name in getattr(item, "fixturenames", ())}
        if not needing:
            continue
        if any(map(is_missing, packages)) or (name in LACKING and LACKING[name]()):
            items[:] = [item for item in items if item not in needing]
            config.stash[NOT_RUN][name] = len(needing)
            config.hook.pytest_deselected(items=list(needing))


def pytest_deselected(items):
    if items and items[0].config.option.markexpr == "not slow" and not items[0].config.option.keyword:
        items[0].config.stash[NOT_RUN]["slow"] += sum(item.get_closest_marker("slow") is not None for item in items)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist, which tells the main process
        session.config.workeroutput["not_run"] = session.config.stash[NOT_RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Every worker collects all tests, so any worker's numbers are those of the run."""
    if hasattr(node, "workeroutput"):
        node.config.stash[NOT_RUN].update(node.workeroutput.get("not_run", {}))


def pytest_terminal_summary(terminalreporter, config):
    not_run = config.stash[NOT_RUN]
    for name, (needed, _, way) in SETS.items():
        if not_run[name]:
            terminalreporter.write_line(f"NOT RUN ({not_run[name]}): tests that need {needed}: {way}")
    if not_run["slow"]:
        terminalreporter.write_line(f'NOT RUN ({not_run["slow"]}): slow tests: pytest -m "" runs every test')


@pytest.fixture
def eight_devices():
    """A test that uses this is left out unless there are eight devices."""


@pytest.fixture
def on_host_cpu():
    """For tests of Pallas's interpreters, which are for a CPU. It changes nothing where the default device is one."""
    with jax.default_device(None if jax.default_backend() == "cpu" else jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture(scope="module")
def quick_to_compile():
    """For tests of many small programs, whose time is mostly LLVM's. XLA's own passes all run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def strict_jax(request):
    if request.node.get_closest_marker("promotes") is not None:  # runs library code that promotes
        yield
    else:
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            yield
