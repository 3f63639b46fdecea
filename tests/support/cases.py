"""The feed-forward and the block next to the float64 oracle: inputs, results, errors and their bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_mlp import ACTIVATIONS, MLPConfig, MLPParams, feed_forward, mlp_block
from gemma_mlp.testing import oracle
from gemma_mlp.testing.oracle import relative_error
from tests.support import samples

EMBED_DIM, HIDDEN_DIM, NORM_EPS = 64, 256, 1e-6
FLOAT32_BOUND = 1e-6  # 8.4 eps of float32; the largest error measured here is 5e-7
FLOOR_FACTOR = 1.05
SAVES = ("input", "gate_up")
# (activation, use_bias, batch, jit): each activation with and without biases, and each batch shape with and without
# jit. The two pairs do not depend on one another.
CASES = [(activation, use_bias, (2, 3), True) for activation in sorted(ACTIVATIONS) for use_bias in (False, True)]
CASES += [("gelu_tanh", True, batch, jit) for batch in samples.BATCHES for jit in (True, False) if batch != (2, 3)]
CASES += [("gelu_tanh", True, (2, 3), False)]


def case(batch, use_bias=False, seed=0, embed_dim=EMBED_DIM, hidden_dim=HIDDEN_DIM):
    """Float64 parameters, x and dy, all of values that bfloat16 represents."""
    rng = np.random.default_rng(seed)
    arrays = samples.mlp_arrays(rng, embed_dim, hidden_dim, use_bias)
    return arrays, samples.normal(rng, (*batch, embed_dim)), samples.normal(rng, (*batch, embed_dim))


def run(arrays, x, dy, input_dtype, *, jit=False, param_dtype=None, **options):
    """y, dparams and dx of the package."""
    function = functools.partial(feed_forward, **options)
    compute = functools.partial(samples.value_and_pullback, function)
    params = samples.mlp_params(arrays, param_dtype or input_dtype)
    return (jax.jit(compute) if jit else compute)(params, jnp.asarray(x, input_dtype), dy)


def errors(result, expected):
    """The relative errors of y, of every parameter's gradient and of dx."""
    (y, dparams, dx), (y_exact, dparams_exact, dx_exact) = result, expected
    leaves = dict(samples.mlp_leaves(dparams), y=y, dx=dx)
    return named_errors(leaves, dict(dparams_exact, y=y_exact, dx=dx_exact))


def named_errors(leaves, exact):
    assert set(leaves) == set(exact)
    return {name: relative_error(leaf, exact[name]) for name, leaf in leaves.items()}


def between(stored):
    """How gate, up and dh are rounded between the matmuls if results are `stored`: alike, but not at all on a CPU."""
    return oracle.exact if jax.default_backend() == "cpu" else stored


def exact_result(arrays, x, dy, activation, stored=oracle.exact, **roundings):
    y, _ = oracle.mlp(arrays, x, activation, stored, between(stored))
    return y, *oracle.mlp_gradients(arrays, x, dy, activation, stored, between=between(stored), **roundings)


def floor_errors(arrays, x, dy, activation, exact, save, **roundings):
    """The errors of exact arithmetic, except that each array that must be stored with `save` is rounded to bfloat16."""
    saved = oracle.bfloat16 if save == "gate_up" else oracle.exact
    y, dparams, dx = exact_result(arrays, x, dy, activation, oracle.bfloat16, saved=saved, **roundings)
    return errors((y, MLPParams(**dparams), dx), exact)


def block_case(batch, use_bias=False, post_norm=True, embed_dim=EMBED_DIM, hidden_dim=HIDDEN_DIM, scale=1.0):
    rng = np.random.default_rng(0)
    arrays = samples.block_arrays(rng, embed_dim, hidden_dim, use_bias, post_norm)
    return arrays, samples.normal(rng, (*batch, embed_dim), scale), samples.normal(rng, (*batch, embed_dim))


def run_block(arrays, x, dy, dtype, *, jit=False, **options):
    embed_dim, hidden_dim = arrays["mlp"]["gate_proj"].shape
    config = MLPConfig(embed_dim, hidden_dim, use_bias="gate_bias" in arrays["mlp"], **options)
    compute = functools.partial(samples.value_and_pullback, functools.partial(mlp_block, config=config))
    return (jax.jit(compute) if jit else compute)(samples.block_params(arrays, dtype), jnp.asarray(x, dtype), dy)


def exact_block_result(arrays, x, dy, activation="gelu_tanh", eps=NORM_EPS, stored=oracle.exact, plus_one=True):
    y = oracle.block(arrays, x, activation, eps, stored, plus_one, between(stored))
    return y, *oracle.block_gradients(arrays, x, dy, activation, eps, stored, plus_one, between(stored))


def block_errors(result, expected):
    return named_errors(*(dict(samples.block_leaves(dparams), y=y, dx=dx) for y, dparams, dx in (result, expected)))
