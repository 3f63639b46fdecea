"""Checks of values are off by default. Inside check_values they work under every transformation."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import gemma_mlp
from gemma_mlp import MLPConfig, MLPParams, feed_forward, mlp
from gemma_mlp.checks import check_values

CONFIG = MLPConfig(8, 16)


def params(bad=False):
    good = MLPParams.init(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), good) if bad else good


def stacked(bad=False):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params(bad))


def scanned(params, x, step=mlp):
    return jax.lax.scan(lambda x, layer: (x + step(layer, x, CONFIG), None), x, params)[0].sum()


def remat(params, x):
    return scanned(params, x, jax.checkpoint(mlp, static_argnums=2))


def loss(params, x):
    return feed_forward(params, x).sum()


FUNCTIONS = {
    "eager": (feed_forward, params),
    "jit": (jax.jit(feed_forward), params),
    "vmap": (jax.vmap(feed_forward, in_axes=(None, 0)), params),
    "grad": (jax.grad(loss), params),
    "scan": (scanned, stacked),
    "grad of scan": (jax.grad(scanned), stacked),
    "grad of scan of remat": (jax.grad(remat), stacked),
    "jit of grad of scan": (jax.jit(jax.value_and_grad(scanned)), stacked),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_non_finite_values_are_found(name):
    function, make_params = FUNCTIONS[name]
    x = jnp.ones((3, 8))
    function(make_params(bad=True), x)  # off by default
    checked = check_values(function)
    for got, expected in zip(jax.tree.leaves(checked(make_params(), x)), jax.tree.leaves(function(make_params(), x))):
        assert jnp.allclose(got, expected, rtol=1e-5)
    with pytest.raises(AssertionError, match="non-finite"):
        checked(make_params(bad=True), x)
    with pytest.raises(AssertionError, match="non-finite"):
        checked(make_params(), x.at[0, 0].set(jnp.inf))
    function(make_params(bad=True), x)  # and off again


def test_the_message_names_what_is_wrong():
    with pytest.raises(AssertionError, match="params"):
        check_values(feed_forward)(params(bad=True), jnp.ones(8))
    with pytest.raises(AssertionError, match="'x'"):
        check_values(feed_forward)(params(), jnp.full(8, jnp.nan))


def test_a_norm_is_checked_too():
    with pytest.raises(AssertionError, match="'scale'"):
        check_values(gemma_mlp.rms_norm)(jnp.full(8, jnp.inf), jnp.ones(8))


def test_a_non_finite_gradient_is_found():
    """sqrt has an infinite slope at 0, where the value itself is finite."""
    zero = jax.tree.map(jnp.zeros_like, params())
    with pytest.raises(AssertionError, match="gradient of y"):
        check_values(jax.grad(lambda p: jnp.sqrt(feed_forward(p, jnp.ones(8))).sum()))(zero)


def test_an_overflow_inside_is_found():
    big = jax.tree.map(lambda leaf: leaf * 1e30, params())
    with pytest.raises(AssertionError, match="'y'"):
        check_values(feed_forward)(big, jnp.ones(8))


@pytest.mark.parametrize("shell", ["nnx", "linen"])
def test_modules_are_checked_too(shell):
    x = jnp.ones((3, 8))
    if shell == "nnx":
        call = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0))
    else:
        module = gemma_mlp.linen.MLPBlock(CONFIG)
        variables = module.init(jax.random.key(0), x)

        def call(x):
            return module.apply(variables, x)

    checked = check_values(call)
    assert jnp.allclose(checked(x), call(x), rtol=1e-5)
    with pytest.raises(AssertionError, match="non-finite"):
        checked(x * jnp.nan)
