"""Temporary memory of the feed-forward's gradient, from the compilers themselves, in bfloat16.

One layer, a stack under scan and an unrolled one. `plain` is the formula as JAX differentiates it, `remat` the same
under `jax.checkpoint`, `pallas` the package's kernels.
"""

import dataclasses
import functools

import jax

from bench.plain import plain, rematerialised
from gemma_mlp import PRESETS, MLPParams, aot, mlp

MIB = 2**20
TOKENS, LAYERS = 8192, 4

# Name of a column: (target, whether the H200's products go through Triton or through cuBLASLt).
COMPILERS = {
    "CPU": ("cpu", None),
    "v5e": ("tpu v5e:2x2", None),
    "v5p": ("tpu v5p:2x2x1", None),
    "v6e": ("tpu v6e:2x2", None),
    "H200 Triton": ("h200", True),
    "H200 cuBLASLt": ("h200", False),
}
OTHERS = {"plain": plain, "remat": rematerialised}


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
    return aot.compile_for(target, function, *arguments, compiler_options=options).temp_bytes


def compilers():
    """The columns of COMPILERS whose compiler is installed, and for each of the others why it is not there."""
    found, missing = {}, {}
    for name, (target, triton) in COMPILERS.items():
        try:
            aot.devices(target)
            found[name] = target, triton
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def measure(preset, compilers, *, tokens, layers, chunk_size):
    """Yields a row for each stack of each layer: MiB by column, None where the program does not fit the chip."""
    cells = [("plain", None), ("remat", None), ("gate_up", None), ("input", None), ("input", chunk_size)]
    kernels = {column: compiler for column, compiler in compilers.items() if compiler[0] != "cpu"}
    if kernels:
        cells.append(("pallas", None))
    for stack in STACKS:
        for layer, chunk in cells:
            row = {"stack": stack, "layer": layer, "chunk_size": chunk}
            for column, (target, triton) in (kernels if layer == "pallas" else compilers).items():
                options = {"tokens": tokens, "layers": layers, "chunk_size": chunk}
                try:
                    row[column] = stack_bytes(target, stack, layer, preset, triton, **options) / MIB
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    row[column] = None
            yield row
