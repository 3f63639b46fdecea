"""Times low-bit weights and adapters next to bfloat16 weights, and has the memory that the compilers report.

Each result is first compared with the plain formula in float32 on the same weights, dequantised and with the adapters
merged. The contestants then take turns in one run, as in timing.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmark import memory, timing
from gemma_mlp import LoRA, MLPParams, aot, dequantize, merge_lora
from gemma_mlp.checks import require
from gemma_mlp.testing.oracle import relative_error
from gemma_mlp.testing.stacks import (
    LOW_BIT,
    MIB,
    adapters_of,
    compile_adapted,
    compile_forward,
    compile_gradient,
    make_config,
    make_layer,
    plain,
    with_adapters,
)

KINDS = ("dense", "int8", "int4", "int4 groups")
LORA = LoRA(rank=16)
ADAPTERS = ", adapters"  # ends the name of weights with adapters
COMPILERS = {**{chip: memory.COMPILERS[chip] for chip in ("CPU", "v5e", "v6e")}, "H200": ("h200", None)}
BOUND = 0.02  # of a relative error; bfloat16 has 0.002 to 0.006, and a wrong result far more


def measure(preset: str, tokens: tuple[int, ...], gradient_tokens: int, rounds: int):
    """Yields a row for each pass, number of tokens and kind of weights: milliseconds, and the ratio to dense weights.

    Rows of the forward pass also have the MiB of the weights, and the GB/s at which they are read. In the backward pass
    `dense` computes the gradients of all weights. The other rows have adapters and compute only their gradients.
    """
    for count in tokens:
        x = inputs(preset, count)
        contestants, bits = {}, {}
        for kind in KINDS:
            config = make_config(preset, **LOW_BIT[kind])
            params = init(config)
            contestants[kind] = timing.jitted(make_layer(config), params, x)
            bits[kind] = stored_bits(params)
            require_close(kind, contestants[kind](), exact(params, x))
        for row in race("forward", count, contestants, rounds):
            size = bits[row["weights"]] / 8
            yield row | {"MiB": size / MIB, "GB/s": size / row["ms"] / 1e6}

    x, dy = inputs(preset, gradient_tokens), inputs(preset, gradient_tokens, seed=2)
    config = make_config(preset)
    contestants = {"dense": timing.jitted(timing.value_and_gradient(make_layer(config)), init(config), x, dy)}
    for kind in KINDS:
        config = make_config(preset, lora=LORA, **LOW_BIT[kind])
        params = init(config)
        name = kind + ADAPTERS
        contestants[name] = timing.jitted(adapter_gradient(make_layer(config)), params, x, dy)
        require_close(name, contestants[name](), jax.jit(adapter_gradient(exact))(params, x, dy))
    yield from race("gradient", gradient_tokens, contestants, rounds)


def inputs(preset, tokens, seed=1):
    return jax.random.normal(jax.random.key(seed), (tokens, make_config(preset).embed_dim), "bfloat16")


@functools.partial(jax.jit, static_argnums=0)
def init(config):
    """Parameters with random numbers in lora_b too, which is zero before training."""
    params = MLPParams.init(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(adapters_of(params))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    leaves = [0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    return with_adapters(params, jax.tree.unflatten(tree, leaves))


@jax.jit
def exact(params, x):
    """The plain formula in float32."""

    def wide(array):
        return array.astype("float32") if array.dtype == jnp.bfloat16 else array

    with jax.default_matmul_precision("highest"):
        return plain(merge_lora(dequantize(jax.tree.map(wide, params))), wide(x))


def adapter_gradient(layer):
    """Value and gradient with respect to the adapters and x."""

    def compute(params, x, dy):
        y, pull_back = jax.vjp(lambda adapters, x: layer(with_adapters(params, adapters), x), adapters_of(params), x)
        return y, pull_back(dy.astype(y.dtype))

    return compute


def require_close(name, result, expected):
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    errors = [relative_error(*map(np.float64, pair)) for pair in pairs]
    require(
        max(errors) <= BOUND,
        f"A result with weights {name!r} must be within {BOUND} of the plain formula in float32.",
        f"relative errors {', '.join(f'{error:.2g}' for error in errors)}",
        "do not trust the times: find what computes the wrong result.",
    )


def race(which, tokens, contestants, rounds):
    times = timing.race(contestants, rounds)
    for name, milliseconds in times.items():
        ratio = milliseconds / times["dense"]
        yield {"pass": which, "tokens": tokens, "weights": name, "ms": milliseconds, "ratio": ratio}


def stored_bits(params) -> int:
    """The size of arrays as the compilers store them: two int4 to a byte."""
    return sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in jax.tree.leaves(params))


def measure_memory(preset, compilers, *, tokens, gradient_tokens, layers):
    """Yields rows: MiB of temporary memory and of arguments in each column, or None where a program does not fit.

    The gradients are those of a scanned stack, with what `measure` computes.
    """
    gradient = {"tokens": gradient_tokens, "layers": layers}
    all_weights = functools.partial(compile_gradient, stack="scanned", **gradient)
    adapters = functools.partial(compile_adapted, **gradient)
    programs = [
        *(
            ("forward", count, kind, functools.partial(compile_forward, tokens=count))
            for count in tokens
            for kind in KINDS
        ),
        ("gradient", gradient_tokens, "dense", all_weights),
        *(("gradient", gradient_tokens, kind + ADAPTERS, adapters) for kind in KINDS),
    ]
    for which, count, name, compile_program in programs:
        lora = LORA if name.endswith(ADAPTERS) else None
        config = make_config(preset, lora=lora, **LOW_BIT[name.removesuffix(ADAPTERS)])
        row = {"pass": which, "tokens": count, "weights": name}
        for column, (target, _) in compilers.items():
            try:
                compiled = compile_program(target=target, config=config)
                row[column] = [compiled.temp_bytes / MIB, compiled.argument_bytes / MIB]
            except aot.DoesNotFit:
                row[column] = None
        yield row
