"""Programs of one feed-forward and of stacks of them, for the compilers to say what they take; all in bfloat16."""

import dataclasses
import functools

import jax

from gemma_mlp.aot import compile_for
from gemma_mlp.block import mlp
from gemma_mlp.config import PRESETS
from gemma_mlp.params import MLPParams

MIB = 2**20
TOKENS, LAYERS = 8192, 4


def plain(params, x):
    """(gelu_tanh(x W_gate) * (x W_up)) W_down, every step in the dtype of the operands, for JAX to differentiate."""
    return (jax.nn.gelu(x @ params.gate_proj) * (x @ params.up_proj)) @ params.down_proj


rematerialised = jax.checkpoint(plain)
"""The same with a user's one line against the memory it takes."""


def config(preset, save="input", chunk_size=None, implementation=None):
    options = {"save": save, "chunk_size": chunk_size, "implementation": implementation}
    return dataclasses.replace(PRESETS[preset], param_dtype="bfloat16", **options)


def params(config, layers=None):
    shapes = jax.eval_shape(lambda: MLPParams.init(config, jax.random.key(0)))
    lead = () if layers is None else (layers,)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), shapes)


def stream(config, tokens=TOKENS):
    return jax.ShapeDtypeStruct((tokens, config.embed_dim), "bfloat16")


def array(config):
    """One [T, F] in bfloat16, in bytes."""
    return TOKENS * config.hidden_dim * 2


def apply(config):
    return lambda params, x: mlp(params, x, config)


def one(layer):
    return lambda params, x, dy: jax.vjp(layer, params, x)[1](dy)


def scanned(layer):
    def loss(params, x):
        return jax.lax.scan(lambda x, p: (x + layer(p, x), None), x, params)[0].astype("float32").sum()

    return jax.grad(loss, argnums=(0, 1))


def unrolled(layer):
    def loss(params, x):
        for i in range(jax.tree.leaves(params)[0].shape[0]):
            x = x + layer(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
        return x.astype("float32").sum()

    return jax.grad(loss, argnums=(0, 1))


STACKS = {"one": one, "scanned": scanned, "unrolled": unrolled}


OTHERS = {"plain": plain, "remat": rematerialised}


@functools.cache
def stack_bytes(target, stack, layer, preset, triton=None, *, tokens=TOKENS, layers=LAYERS, chunk_size=None):
    """Temporary memory of the gradient of a stack of layers. `layer`: a save policy, "plain", "remat" or "pallas"."""
    if layer == "pallas":
        settings = config(preset, implementation="pallas")
    else:
        settings = config(preset) if layer in OTHERS else config(preset, layer, chunk_size)
    function = STACKS[stack](OTHERS.get(layer) or apply(settings))
    x = stream(settings, tokens)
    arguments = (params(settings), x, x) if stack == "one" else (params(settings, layers), x)
    options = None if triton is None else {"xla_gpu_enable_triton_gemm": triton}
    return compile_for(target, function, *arguments, compiler_options=options).temp_bytes
