"""The whole block against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import MLPBlockParams, MLPConfig, mlp_block
from gemma_mlp.testing import oracle, samples
from gemma_mlp.testing.oracle import relative_error
from tests.support.comparison import CASES

EMBED_DIM, HIDDEN_DIM, EPS = 64, 256, 1e-6


def case(batch, use_bias=False, post_norm=True, embed_dim=EMBED_DIM, hidden_dim=HIDDEN_DIM, scale=1.0):
    rng = np.random.default_rng(0)
    arrays = samples.block_arrays(rng, embed_dim, hidden_dim, use_bias, post_norm)
    return arrays, samples.normal(rng, (*batch, embed_dim), scale), samples.normal(rng, (*batch, embed_dim))


def run(arrays, x, dy, dtype, *, jit=False, **options):
    embed_dim, hidden_dim = arrays["mlp"]["gate_proj"].shape
    config = MLPConfig(embed_dim, hidden_dim, use_bias="gate_bias" in arrays["mlp"], **options)
    compute = functools.partial(samples.value_and_pullback, functools.partial(mlp_block, config=config))
    return (jax.jit(compute) if jit else compute)(samples.block_params(arrays, dtype), jnp.asarray(x, dtype), dy)


def exact_result(arrays, x, dy, activation="gelu_tanh", eps=EPS, stored=oracle.exact):
    y = oracle.block(arrays, x, activation, eps, stored)
    return y, *oracle.block_gradients(arrays, x, dy, activation, eps, stored)


def errors(result, expected):
    y, dparams, dx = result
    y_exact, dparams_exact, dx_exact = expected
    got, exact = samples.block_leaves(dparams), samples.block_leaves(dparams_exact)
    assert set(got) == set(exact)
    pairs = {name: (got[name], exact[name]) for name in got} | {"y": (y, y_exact), "dx": (dx, dx_exact)}
    return {name: relative_error(*pair) for name, pair in pairs.items()}


@pytest.mark.parametrize(("activation", "use_bias", "batch", "jit"), CASES, ids=str)
def test_float32_equals_the_oracle(activation, use_bias, batch, jit):
    arrays, x, dy = case(batch, use_bias)
    result = run(arrays, x, dy, "float32", jit=jit, activation=activation)
    assert result[0].shape == x.shape and result[0].dtype == jnp.float32
    for name, error in errors(result, exact_result(arrays, x, dy, activation)).items():
        assert error <= 1e-6, name


@pytest.mark.parametrize(("activation", "use_bias", "batch", "jit"), CASES, ids=str)
def test_bfloat16_is_at_the_floor_of_rounding_what_is_stored(activation, use_bias, batch, jit):
    arrays, x, dy = case(batch, use_bias)
    exact = exact_result(arrays, x, dy, activation)
    floor = errors(exact_result(arrays, x, dy, activation, stored=oracle.bfloat16), exact)
    result = run(arrays, x, dy, "bfloat16", jit=jit, activation=activation)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result)} == {"bfloat16"}
    for name, error in errors(result, exact).items():
        assert error <= 1.05 * floor[name], name


def test_without_post_norm_as_in_gemma_1():
    arrays, x, dy = case((3,), post_norm=False)
    for name, error in errors(run(arrays, x, dy, "float32", post_norm=False), exact_result(arrays, x, dy)).items():
        assert error <= 1e-6, name


def test_square_weights_are_not_transposed():
    arrays, x, dy = case((3,), embed_dim=64, hidden_dim=64)
    for name, error in errors(run(arrays, x, dy, "float32"), exact_result(arrays, x, dy)).items():
        assert error <= 1e-6, name


def test_eps_reaches_both_norms():
    """With a tiny input the pre-norm, and with tiny weights the post-norm, depends on where eps stands."""
    arrays, x, dy = case((3,), scale=1e-2)
    arrays["mlp"]["down_proj"] *= 2.0**-7
    eps = 1e-4
    for name, error in errors(
        run(arrays, x, dy, "float32", norm_eps=eps), exact_result(arrays, x, dy, eps=eps)
    ).items():
        assert error <= 1e-6, name


def test_the_residual_stream_keeps_its_dtype():
    arrays, x, _ = case((3,))
    params = samples.block_params(arrays, "float32")
    config = MLPConfig(EMBED_DIM, HIDDEN_DIM, dtype="bfloat16")
    for dtype in ("float32", "bfloat16"):
        assert mlp_block(params, jnp.asarray(x, dtype), config).dtype == dtype
    # What the block adds to a large float32 stream is at the floor of bf16 products: the stream itself is not rounded.
    x = 64 * x
    added = np.float64(mlp_block(params, jnp.float32(x), config)) - x
    assert relative_error(added, oracle.block(arrays, x, "gelu_tanh", EPS) - x) <= 5e-3


def test_saved_residuals():
    """What the block, the MLP and the post-norm receive, in bfloat16: none of a norm's float32 arrays."""
    arrays, x, _ = case((3, 5))
    params, x = samples.block_params(arrays, "bfloat16"), jnp.asarray(x, "bfloat16")
    _, pull_back = jax.vjp(functools.partial(mlp_block, config=MLPConfig(EMBED_DIM, HIDDEN_DIM)), params, x)
    leaves = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]
    assert [leaf.dtype.name for leaf in leaves if leaf.shape[:2] == (3, 5)] == ["bfloat16"] * 3


def test_dropout_acts_only_with_a_key():
    arrays, x, _ = case((3,))
    params, x = samples.block_params(arrays, "float32"), jnp.float32(x)
    config = MLPConfig(EMBED_DIM, HIDDEN_DIM, dropout_rate=0.5)
    plain = mlp_block(params, x, MLPConfig(EMBED_DIM, HIDDEN_DIM))
    np.testing.assert_array_equal(mlp_block(params, x, config), plain)
    first, second = (mlp_block(params, x, config, dropout_key=jax.random.key(seed)) for seed in (0, 1))
    assert not jnp.array_equal(first, plain) and not jnp.array_equal(first, second)


def test_init_makes_what_the_config_asks_for():
    params = MLPBlockParams.init(MLPConfig(4, 8, param_dtype="bfloat16"), jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert not jnp.any(params.pre_norm.scale) and params.post_norm is not None and not jnp.any(params.post_norm.scale)
    assert MLPBlockParams.init(MLPConfig(4, 8, post_norm=False), jax.random.key(0)).post_norm is None
