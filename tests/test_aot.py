"""Reading what a compiler prints, and the errors: neither needs a compiler."""

from importlib import metadata

import jax
import pytest

from gemma_mlp import aot
from gemma_mlp.aot import Collective

HLO = """
  %all-reduce.1 = f32[128,64]{1,0} all-reduce(%dot), channel_id=1, replica_groups={{0,1}}
  %start = (bf16[8,16]{1,0}, bf16[32,16]{1,0:T(8,128)}) all-gather-start(%p0), dimensions={0}
  %done = bf16[32,16]{1,0:T(8,128)} all-gather-done(%start)
  %pair = (u8[4]{0}, pred[2,3]{1,0}) all-to-all(%a, %b)
  %scalar = s32[] reduce-scatter(%c)
  %fusion = bf16[32,16]{1,0} fusion(%all-reduce.1), calls=%all-reduce-computation
"""


def test_collectives_are_read_from_the_text():
    assert aot.collectives(HLO) == (
        Collective("all-reduce", 128 * 64 * 4),
        Collective("all-gather", 32 * 16 * 2),
        Collective("all-to-all", 4 + 6),
        Collective("reduce-scatter", 4),
    )


@pytest.mark.parametrize("target", ["v5e:2x2", "tpu", "tpu v5e", "h100", "", "tpu v5e:2x"])
def test_an_unknown_target_is_explained(target):
    with pytest.raises(ValueError, match=r"A target is .*tpu v5e:2x2.* \"h200\", or \"cpu\"\. Received: "):
        aot.compile_for(target, lambda x: x, jax.ShapeDtypeStruct((), "float32"))


def test_this_machines_own_compiler():
    x = jax.ShapeDtypeStruct((4, 4), "float32")
    compiled = aot.compile_for("cpu", lambda x: x @ x, x)
    assert compiled.argument_bytes == compiled.output_bytes == 64 and compiled.flops == pytest.approx(128)


@pytest.mark.parametrize(("target", "package"), [("tpu v4:2x2x1", "libtpu"), ("h200", "jax-cuda13-plugin")])
def test_a_missing_compiler_is_explained(target, package, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    aot._topology.cache_clear()
    with pytest.raises(ImportError, match=rf"{package} is not installed. Fix: pip install 'gemma-mlp\[aot\]'"):
        aot.devices(target)


def test_a_plugin_of_another_version_is_explained(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.2")
    aot._topology.cache_clear()
    message = f"jax-cuda13-plugin 0.1.2 does not fit JAX {jax.__version__}. Fix: pip install jax-cuda13-plugin=="
    with pytest.raises(ImportError, match=message):
        aot.devices("h200")
