"""Targets, errors, and this machine's own compiler. These tests need no compiler of another chip."""

from importlib import metadata

import jax
import pytest
from jax.experimental import topologies

from gemma_mlp import aot
from gemma_mlp.aot import compilers


@pytest.mark.parametrize("target", ["v5e:2x2", "tpu", "tpu v5e", "h100", "", "tpu v5e:2x", "h200:9", "h200:0"])
def test_an_unknown_target_is_explained(target):
    with pytest.raises(ValueError, match=r"A target must be .*tpu v5e:2x2.* \"h200\" .* or \"cpu\"\."):
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
    compilers._topology.cache_clear()
    with pytest.raises(ImportError, match=rf"{package} must be installed\. Fix: pip install 'gemma-mlp\[aot\]'"):
        aot.devices(target)


def test_a_plugin_of_another_version_is_explained(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.2")
    compilers._topology.cache_clear()
    message = rf"must have the version of JAX, {jax.__version__}\. Got: 0.1.2\. Fix: pip install jax-cuda13-plugin=="
    with pytest.raises(ImportError, match=message):
        aot.devices("h200")


def test_a_plugin_that_did_not_start_is_explained(monkeypatch):
    """Unless JAX_PLATFORMS=cpu, JAX looks for a GPU, and without CUDA's libraries the plugin stays unstarted."""

    def get_topology_desc(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(metadata, "version", lambda name: jax.__version__)
    monkeypatch.setattr(topologies, "get_topology_desc", get_topology_desc)
    compilers._topology.cache_clear()
    with pytest.raises(ImportError, match=r"not implemented for cuda\. Fix: set JAX_PLATFORMS=cpu before JAX starts"):
        aot.devices("h200")


def compile_with_error(message, monkeypatch):
    def fail(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    aot.compile_for("cpu", lambda x: x, jax.ShapeDtypeStruct((), "float32"))


def test_a_program_that_does_not_fit_says_what_it_needs(monkeypatch):
    """In the words of libtpu 0.0.52."""
    message = (
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (17.53G) exceeds available HBM (15.75G)."
    )
    with pytest.raises(aot.DoesNotFit, match=r"needs 17\.53 GiB") as error:
        compile_with_error(message, monkeypatch)
    assert error.value.needed_bytes == 17.53 * 2**30


@pytest.mark.parametrize(
    "message", ["INTERNAL: total memory required (1.00G)", "RESOURCE_EXHAUSTED: of something else"]
)
def test_any_other_error_of_a_compiler_is_passed_on(message, monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message.partition("(")[0]):
        compile_with_error(message, monkeypatch)


def test_a_program_that_this_jax_cannot_read_has_its_memory_but_no_text(monkeypatch):
    """In the words of JAX 0.10.2 about a program for a TPU 7x."""
    compiled = aot.compile_for("cpu", lambda x: x + 1, jax.ShapeDtypeStruct((), "float32"))

    def fail(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update instruction")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", fail)
    assert compiled.output_bytes == 4
    with pytest.raises(RuntimeError, match=r"be able to read the program.*Got: JAX .*async-update.*Fix: upgrade JAX"):
        _ = compiled.collectives
