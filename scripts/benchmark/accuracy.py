"""Measures the relative L2 error in bfloat16 against the float64 oracle, and the error that rounding alone makes.

The row `floor` is the error of the oracle when it rounds, once, each array that must be stored. These are h, y, the
gradients of gate and up, and each result.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import gemma_mlp
from gemma_mlp.testing import oracle, samples
from gemma_mlp.testing.stacks import plain

RESULTS = ("y", "dx", "gate_proj", "up_proj", "down_proj")
CONTESTANTS = {
    "input": functools.partial(gemma_mlp.feed_forward, save="input"),
    "gate_up": functools.partial(gemma_mlp.feed_forward, save="gate_up"),
    "plain": plain,
}


def measure(config: gemma_mlp.MLPConfig, tokens: int):
    """Yields a row for the floor and for each contestant. Only one contestant is in memory at a time."""
    rng = np.random.default_rng(0)
    arrays = samples.mlp_arrays(rng, config.embed_dim, config.hidden_dim, use_bias=False)
    x, dy = (samples.normal(rng, (tokens, config.embed_dim)) for _ in range(2))
    exact = exact_result(arrays, x, dy, oracle.exact)

    def row(name, result):
        errors = {name: oracle.relative_error(result.pop(name), exact[name]) for name in RESULTS}
        return {"tokens": tokens, "layer": name, **errors}

    def run(function):
        params = samples.mlp_params(arrays, "bfloat16")
        compute = jax.jit(lambda params, x, dy: samples.value_and_pullback(function, params, x, dy))
        y, dparams, dx = compute(params, jnp.asarray(x, "bfloat16"), dy)
        return {"y": y, "dx": dx, **samples.mlp_leaves(dparams)}

    yield row("floor", exact_result(arrays, x, dy, oracle.bfloat16))
    for name, function in CONTESTANTS.items():
        yield row(name, run(function))


def exact_result(arrays, x, dy, stored):
    y, _ = oracle.mlp(arrays, x, "gelu_tanh", stored)
    dparams, dx = oracle.mlp_gradients(arrays, x, dy, "gelu_tanh", stored)
    return {"y": y, "dx": dx, **dparams}
