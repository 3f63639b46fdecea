"""The feed-forward beside the float64 oracle: cases, runs, errors, and the bounds they are held to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_mlp import ACTIVATIONS, MLPParams, feed_forward
from gemma_mlp.testing import oracle, samples
from gemma_mlp.testing.oracle import relative_error

EMBED_DIM, HIDDEN_DIM = 64, 256
FLOAT32_BOUND = 1e-6  # 8.4 eps of float32; the largest error measured here is 5e-7
FLOOR_FACTOR = 1.05
SAVES = ("input", "gate_up")
# Every activation with and without biases, and every shape compiled or not: that much is independent.
CASES = [(activation, use_bias, (2, 3), True) for activation in sorted(ACTIVATIONS) for use_bias in (False, True)]
CASES += [("gelu_tanh", True, batch, jit) for batch in samples.BATCHES for jit in (False, True) if batch != (2, 3)]
CASES += [("gelu_tanh", True, (2, 3), False)]


def case(batch, use_bias=False, seed=0, embed_dim=EMBED_DIM, hidden_dim=HIDDEN_DIM):
    rng = np.random.default_rng(seed)
    arrays = samples.mlp_arrays(rng, embed_dim, hidden_dim, use_bias)
    return arrays, samples.normal(rng, (*batch, embed_dim)), samples.normal(rng, (*batch, embed_dim))


def run(arrays, x, dy, input_dtype, *, jit=False, param_dtype=None, **options):
    """y, dparams, dx of the package."""
    function = functools.partial(feed_forward, **options)
    compute = functools.partial(samples.value_and_pullback, function)
    params = samples.mlp_params(arrays, param_dtype or input_dtype)
    return (jax.jit(compute) if jit else compute)(params, jnp.asarray(x, input_dtype), dy)


def errors(result, expected):
    """Relative error of y, of every parameter's gradient and of dx."""
    y, dparams, dx = result
    y_exact, dparams_exact, dx_exact = expected
    pairs = {name: (grad, dparams_exact[name]) for name, grad in samples.mlp_leaves(dparams).items()}
    assert set(pairs) == set(dparams_exact)
    pairs |= {"y": (y, y_exact), "dx": (dx, dx_exact)}
    return {name: relative_error(*pair) for name, pair in pairs.items()}


def exact_result(arrays, x, dy, activation, stored=oracle.exact, **roundings):
    y, _ = oracle.mlp(arrays, x, activation, stored)
    return y, *oracle.mlp_gradients(arrays, x, dy, activation, stored, **roundings)


def floor_errors(arrays, x, dy, activation, exact, save, **roundings):
    """The error of rounding, exact otherwise, what is stored with `save`."""
    kept = oracle.bfloat16 if save == "gate_up" else oracle.exact
    y, dparams, dx = exact_result(arrays, x, dy, activation, oracle.bfloat16, kept=kept, **roundings)
    return errors((y, MLPParams(**dparams), dx), exact)
