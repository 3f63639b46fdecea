"""The errors and this machine's own compiler: neither needs another."""

from importlib import metadata

import jax
import pytest
from jax.experimental import topologies

from gemma_mlp import aot
from gemma_mlp.aot import compilers as targets


@pytest.mark.parametrize("target", ["v5e:2x2", "tpu", "tpu v5e", "h100", "", "tpu v5e:2x", "h200:9", "h200:0"])
def test_an_unknown_target_is_explained(target):
    with pytest.raises(ValueError, match=r"A target is .*tpu v5e:2x2.* \"h200\" .* or \"cpu\"\. Received: "):
        aot.compile_for(target, lambda x: x, jax.ShapeDtypeStruct((), "float32"))


def test_this_machines_own_compiler():
    x = jax.ShapeDtypeStruct((4, 4), "float32")
    compiled = aot.compile_for("cpu", lambda x: x @ x, x)
    assert compiled.argument_bytes == compiled.output_bytes == 64 and compiled.flops == pytest.approx(128)
    assert compiled.alias_bytes == 0 and compiled.total_bytes == 128 + compiled.temp_bytes
    donated = aot.compile_for("cpu", lambda x: x + 1, x, donate_argnums=(0,))
    assert donated.alias_bytes == 64 and donated.total_bytes == 64 + donated.temp_bytes


@pytest.mark.parametrize(("target", "package"), [("tpu v4:2x2x1", "libtpu"), ("h200", "jax-cuda13-plugin")])
def test_a_missing_compiler_is_explained(target, package, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    targets._topology.cache_clear()
    with pytest.raises(ImportError, match=rf"{package} is not installed. Fix: pip install 'gemma-mlp\[aot\]'"):
        aot.devices(target)


def test_a_plugin_of_another_version_is_explained(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.2")
    targets._topology.cache_clear()
    message = f"jax-cuda13-plugin 0.1.2 does not fit JAX {jax.__version__}. Fix: pip install jax-cuda13-plugin=="
    with pytest.raises(ImportError, match=message):
        aot.devices("h200")


def test_a_plugin_that_did_not_start_is_explained(monkeypatch):
    """As JAX leaves it where JAX_PLATFORMS does not keep it from looking for a GPU, and there are no CUDA libraries."""

    def get_topology_desc(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(metadata, "version", lambda name: jax.__version__)
    monkeypatch.setattr(topologies, "get_topology_desc", get_topology_desc)
    targets._topology.cache_clear()
    with pytest.raises(ImportError, match=r"not implemented for cuda\. Fix: set JAX_PLATFORMS=cpu before JAX starts"):
        aot.devices("h200")
