"""Programs of one MLP layer and of stacks of layers, to be compiled for the memory that their gradients take.

tests/aot and scripts/benchmark.py share them. Arrays are bfloat16 (the parameters float32 on request), and abstract:
they have a shape but no values.
"""

import dataclasses
import functools

import jax

from gemma_mlp.aot import compile_for
from gemma_mlp.config import PRESETS
from gemma_mlp.op.api import mlp
from gemma_mlp.params import MLPParams
from gemma_mlp.weights import LORA

MIB = 2**20
TOKENS, LAYERS = 8192, 4
LOW_BIT = {  # options of a config
    "dense": {},
    "int8": {"weight_dtype": "int8"},
    "int4": {"weight_dtype": "int4"},
    "float8": {"weight_dtype": "float8_e4m3fn"},
    "int4 groups": {"weight_dtype": "int4", "group_size": 32},
}


def plain(params, x):
    """(gelu_tanh(x W_gate) * (x W_up)) W_down, rounded to the operands' dtype at every step, as users write it."""
    return (jax.nn.gelu(x @ params.gate_proj) * (x @ params.up_proj)) @ params.down_proj


NOT_OURS = {"plain": plain, "remat": jax.checkpoint(plain)}  # remat: a user's own line against the memory of plain


def make_config(preset, save="input", chunk_size=None, implementation=None, param_dtype="bfloat16", **weights):
    """`weights`: weight_dtype, group_size, lora."""
    options = {"save": save, "chunk_size": chunk_size, "implementation": implementation, **weights}
    return dataclasses.replace(PRESETS[preset], param_dtype=param_dtype, **options)


def make_layer(config):
    return functools.partial(mlp, config=config)


def params(config, layers=None):
    """The parameters of one layer, or of `layers` layers stacked along a leading axis."""
    shapes = jax.eval_shape(lambda: MLPParams.init(config, jax.random.key(0)))
    lead = () if layers is None else (layers,)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), shapes)


def inputs(config, tokens=TOKENS):
    return jax.ShapeDtypeStruct((tokens, config.embed_dim), "bfloat16")


def hidden_bytes(config):
    """The size of one [T, F] array, such as gate, up or h."""
    return TOKENS * config.hidden_dim * 2


def one(layer):
    """The gradient of one layer for a given dy."""
    return lambda params, x, dy: jax.vjp(layer, params, x)[1](dy)


def scanned(layer):
    """The gradient of a stack of layers with residual connections, under `jax.lax.scan`."""

    def loss(params, x):
        return jax.lax.scan(lambda x, p: (x + layer(p, x), None), x, params)[0].astype("float32").sum()

    return jax.grad(loss, argnums=(0, 1))


def unrolled(layer):
    """The same, with the layers written out one after the other. Each has parameters of its own, in a list."""

    def loss(params, x):
        for p in params:
            x = x + layer(p, x)
        return x.astype("float32").sum()

    return jax.grad(loss, argnums=(0, 1))


def adapted(layer):
    """The gradient of a stack under `jax.lax.scan` with respect to the adapters and x. All else is frozen (QLoRA)."""

    def gradient(params, x):
        def loss(adapters, x):
            merged = with_adapters(params, adapters)
            return jax.lax.scan(lambda x, p: (x + layer(p, x), None), x, merged)[0].astype("float32").sum()

        return jax.grad(loss, argnums=(0, 1))(adapters_of(params), x)

    return gradient


def adapters_of(params):
    """A tree like `params` with None for each array that is not an adapter's."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if path[-1].name in LORA else None, params)


def with_adapters(params, adapters):
    """`params` with the arrays of `adapters` in place of their own."""
    return jax.tree.map(lambda new, old: old if new is None else new, adapters, params, is_leaf=lambda a: a is None)


OPTIONS = {  # by name, sets of the compilers' options
    "triton": {"xla_gpu_enable_triton_gemm": True},  # an H200's matmuls go through Triton
    "cublaslt": {"xla_gpu_enable_triton_gemm": False},  # or through cuBLASLt
    "small tiles": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"},  # for a TPU 7x: op/README.md
}
STACKS = {"one": one, "scanned": scanned, "unrolled": unrolled}


def compile_forward(target, config, tokens=TOKENS):
    return compile_for(target, make_layer(config), params(config), inputs(config, tokens))


def compile_adapted(target, config, *, tokens=TOKENS, layers=LAYERS):
    return compile_for(target, adapted(make_layer(config)), params(config, layers), inputs(config, tokens))


def compile_gradient(target, stack, config, layer=None, *, tokens=TOKENS, layers=LAYERS, options=None):
    """Compiles the gradient of one of STACKS, made of `layer` or of our layer.

    options: one of OPTIONS, or None.
    """
    x = inputs(config, tokens)
    arguments = {
        "one": (params(config), x, x),
        "scanned": (params(config, layers), x),
        "unrolled": ([params(config)] * layers, x),
    }[stack]
    gradient = STACKS[stack](layer or make_layer(config))
    return compile_for(target, gradient, *arguments, compiler_options=OPTIONS[options] if options else None)


@functools.cache
def gradient_bytes(
    target,
    stack,
    layer,
    preset,
    options=None,
    *,
    tokens=TOKENS,
    layers=LAYERS,
    chunk_size=None,
    param_dtype="bfloat16",
):
    """Temporary memory of a gradient. `layer` is a save policy, "pallas", or one of NOT_OURS; `options` one of OPTIONS.

    NOT_OURS take parameters in bfloat16 only: they have the dtypes of their operands.
    """
    make = functools.partial(make_config, preset, param_dtype=param_dtype)
    if layer in NOT_OURS:
        config = make_config(preset)
    elif layer == "pallas":
        config = make(implementation="pallas")
    else:
        config = make(save=layer, chunk_size=chunk_size)
    sizes = {"tokens": tokens, "layers": layers, "options": options}
    return compile_gradient(target, stack, config, NOT_OURS.get(layer), **sizes).temp_bytes
