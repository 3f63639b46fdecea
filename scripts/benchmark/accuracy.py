"""Measures the relative L2 error in bfloat16 against the float64 oracle, and the error that rounding alone makes.

The row `floor` is the error of the oracle when it rounds, once, each array that must be stored. These are h, y, the
gradients of gate and up, and each result.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import gemma_mlp
from benchmark import checking, timing
from gemma_mlp.testing import oracle
from gemma_mlp.testing.stacks import plain

RESULTS = ("y", "dx", "gate_proj", "up_proj", "down_proj")
CONTESTANTS = {  # the kernels only where they serve the device
    "input": functools.partial(gemma_mlp.feed_forward, save="input"),
    "gate_up": functools.partial(gemma_mlp.feed_forward, save="gate_up"),
    "plain": plain,
    "pallas": functools.partial(gemma_mlp.feed_forward, implementation="pallas"),
    "pallas_gate_up": functools.partial(gemma_mlp.feed_forward, implementation="pallas", save="gate_up"),
}


def measure(config: gemma_mlp.MLPConfig, tokens: int):
    """Yields a row for the floor and for each contestant. Only one contestant is in memory at a time."""
    rng = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return oracle.bfloat16(rng.standard_normal(shape) * scale)

    D, F = config.embed_dim, config.hidden_dim
    gate, up, down = draw(D, F, scale=D**-0.5), draw(D, F, scale=D**-0.5), draw(F, D, scale=F**-0.5)
    arrays = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    x, dy = draw(tokens, D), draw(tokens, D)
    exact = exact_result(arrays, x, dy, oracle.exact)

    def row(name, result):
        errors = {name: oracle.relative_error(result.pop(name), exact[name]) for name in RESULTS}
        return {"tokens": tokens, "layer": name, **errors}

    def run(function):
        @jax.jit
        def compute(params, x, dy):
            y, pull_back = jax.vjp(function, params, x)
            return y, *pull_back(dy)

        params = gemma_mlp.MLPParams(**{name: jnp.asarray(a, "bfloat16") for name, a in arrays.items()})
        y, dparams, dx = compute(params, *(jnp.asarray(a, "bfloat16") for a in (x, dy)))
        return {"y": y, "dx": dx} | {name: getattr(dparams, name) for name in arrays}

    yield row("floor", exact_result(arrays, x, dy, oracle.bfloat16))
    refused = timing.kernels_refuse(config, "bfloat16") is not None
    for name, function in CONTESTANTS.items():
        if refused and name.startswith("pallas"):
            continue
        try:
            yield row(name, run(function))
        except Exception as error:  # it may not compile on this device, and the others are to be measured
            yield {"tokens": tokens, "layer": name, "left_out": checking.explain(error)}


def exact_result(arrays, x, dy, stored):
    y, _ = oracle.mlp(arrays, x, "gelu_tanh", stored)
    dparams, dx = oracle.mlp_gradients(arrays, x, dy, "gelu_tanh", stored)
    return {"y": y, "dx": dx, **dparams}
