"""What the chips' compilers make of low-bit weights and adapters, in bfloat16.

Bounds of temporary memory are relative to dense weights, or in MiB as measured. gemma_mlp/op/README.md has the figures.
"""

import functools
import itertools

import pytest

from gemma_mlp import LoRA
from gemma_mlp.testing.stacks import (
    LOW_BIT,
    MIB,
    TOKENS,
    compile_adapted,
    compile_forward,
    make_config,
)
from tests.support.vary import slow, vary

pytestmark = pytest.mark.needs_compilers
V5E, V6E, H200 = "tpu v5e:2x2", "tpu v6e:2x2", "h200"
BITS = {"dense": 16, "int8": 8, "int4": 4, "float8": 8, "int4 groups": 4}
SIZES = ("gemma2_2b", "gemma2_27b")
KINDS = [kind for kind in LOW_BIT if kind != "dense"]


@functools.cache
def forward(target, preset, tokens, kind):
    """Bytes: (temporary, of the arguments)."""
    compiled = compile_forward(target, make_config(preset, **LOW_BIT[kind]), tokens)
    return compiled.temp_bytes, compiled.argument_bytes


def weight_count(preset):
    config = make_config(preset)
    return 3 * config.embed_dim * config.hidden_dim


@vary(
    "target preset tokens kind",
    [
        *itertools.product((H200,), SIZES, (1, 16, 1024), KINDS),
        *itertools.product((V5E,), ("gemma2_27b",), (1024,), KINDS),
        *itertools.product((V6E,), ("gemma2_2b",), (16,), KINDS),
        *itertools.product((V6E,), ("gemma2_27b",), (1024,), ("int4 groups",)),
        *itertools.product((V5E,), ("gemma2_2b",), (1,), ("int4 groups",)),
    ],
)
def test_forward_makes_no_copy_of_the_weights(target, preset, tokens, kind):
    """A TPU holds the scales in float32, an H200 a slice of one weight, 1/24 of all, in the compute dtype."""
    share = 8 if kind == "int4 groups" else 16
    allowed = 2 * weight_count(preset) / share if target == H200 else MIB / 2
    assert forward(target, preset, tokens, kind)[0] <= forward(target, preset, tokens, "dense")[0] + allowed


@pytest.mark.parametrize("kind", LOW_BIT)
@pytest.mark.parametrize("target", [slow(V5E), H200])
def test_arguments_take_the_bits_of_the_weights(target, kind):
    """In addition there are x and scales, two bytes for each channel or each of its groups. TPUs pad these a little."""
    config = make_config("gemma2_2b")
    weights = weight_count("gemma2_2b")
    channels = 2 * config.hidden_dim + config.embed_dim
    scales = {"dense": 0, "int4 groups": weights // 32}.get(kind, channels)
    exact = weights * BITS[kind] // 8 + 2 * scales + 2 * config.embed_dim
    padding = 0 if target == H200 else 0.002 * exact
    assert exact <= forward(target, "gemma2_2b", 1, kind)[1] <= exact + padding


def compile_qlora(kind, save="input", tokens=TOKENS):
    """The gradient of four scanned 27B layers on v5e with respect to adapters of rank 16 and x."""
    return compile_adapted(V5E, make_config("gemma2_27b", save, lora=LoRA(rank=16), **LOW_BIT[kind]), tokens=tokens)


@pytest.mark.parametrize(("save", "matmuls", "mib"), [("input", 8, 30), slow("gate_up", 6, 160)])
def test_qlora_computes_no_gradient_and_no_copy_of_the_base(save, matmuls, mib):
    """Three matmuls with a weight forward, three for dh and dx, and two that recompute gate and up. The adapters add
    1 %. 27 and 154 MiB, of which 144 are the saved gate and up. One weight in bfloat16 takes 324 MiB."""
    tokens = 256
    compiled = compile_qlora("int4", save, tokens)
    assert compiled.flops is not None
    assert matmuls <= compiled.flops / (2 * tokens * weight_count("gemma2_27b") / 3) <= 1.01 * matmuls
    assert compiled.temp_bytes <= mib * MIB


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "temporary", "arguments"), [("int4", 2377, 1060), ("int4 groups", 3908, 1181)])
def test_qlora_at_8192_tokens(kind, temporary, arguments):
    """The gradients of all dense weights take 10,080 MiB in all (`test_memory.py`), int4 with adapters 3,524."""
    compiled = compile_qlora(kind)
    assert compiled.temp_bytes == pytest.approx(temporary * MIB, rel=0.01)
    assert compiled.argument_bytes == pytest.approx(arguments * MIB, rel=0.001)
