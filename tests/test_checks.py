"""Checks of values are off by default. Inside check_values they work under every transformation."""

import dataclasses
import functools
import itertools

import flax
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import gemma_mlp
from gemma_mlp import MLPConfig, MLPParams, feed_forward, mlp
from gemma_mlp.checks import check_values
from tests.support.vary import first_is_quick, vary

pytestmark = pytest.mark.usefixtures("quick_to_compile")

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


@pytest.mark.parametrize(("function", "result"), [(feed_forward, "y"), (gemma_mlp.hidden_activations, "h")])
def test_the_message_names_what_is_wrong(function, result):
    checked = check_values(function)
    with pytest.raises(AssertionError, match="params"):
        checked(params(bad=True), jnp.ones(8))
    with pytest.raises(AssertionError, match="'x'"):
        checked(params(), jnp.full(8, jnp.nan))
    with pytest.raises(AssertionError, match=f"'{result}'"):  # an overflow inside
        checked(jax.tree.map(lambda leaf: leaf * 1e30, params()), jnp.ones(8))
    zero = jax.tree.map(jnp.zeros_like, params())
    with pytest.raises(AssertionError, match=f"gradient of {result}"):  # sqrt has an infinite slope at 0
        check_values(jax.grad(lambda p: jnp.sqrt(function(p, jnp.ones(8))).sum()))(zero)


@pytest.mark.parametrize("value", first_is_quick([jnp.inf, jnp.nan]))
def test_a_norm_is_checked_too(value):
    check_values(gemma_mlp.rms_norm)(jnp.zeros(8), jnp.ones(8))
    with pytest.raises(AssertionError, match="'scale'"):
        check_values(gemma_mlp.rms_norm)(jnp.full(8, value), jnp.ones(8))
    with pytest.raises(AssertionError, match="'x'"):
        check_values(gemma_mlp.rms_norm)(jnp.zeros(8), jnp.full(8, value))


@pytest.mark.slow
def test_each_leaf_of_a_block_is_checked():
    whole = gemma_mlp.MLPBlockParams.init(dataclasses.replace(CONFIG, use_bias=True), jax.random.key(0))
    checked = check_values(functools.partial(gemma_mlp.mlp_block, config=dataclasses.replace(CONFIG, use_bias=True)))
    leaves, tree = jax.tree.flatten(whole)
    assert len(leaves) == 8
    checked(whole, jnp.ones(8))
    for i, leaf in enumerate(leaves):
        bad = leaf.at[(0,) * leaf.ndim].set(jnp.nan)
        with pytest.raises(AssertionError, match=r"'scale'|'params'"):
            checked(jax.tree.unflatten(tree, [*leaves[:i], bad, *leaves[i + 1 :]]), jnp.ones(8))


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


def make_model(seed=0):
    return gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(seed))


def train(model, optimizer, x):
    def loss(model):
        return jnp.square(model(x) - 1).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


class Twice(nnx.Module):
    """Two names for one block, as tied weights are."""

    def __init__(self):
        self.first = self.second = make_model()

    def __call__(self, x):
        return self.second(self.first(x))


@pytest.mark.promotes  # Optax relies on it
@vary("tied jitted by_name", itertools.product([False, True], repeat=3))
def test_an_nnx_training_step_updates_model_and_optimizer(tied, jitted, by_name):
    make, step = Twice if tied else make_model, nnx.jit(train) if jitted else train
    x, models = jax.random.normal(jax.random.key(1), (2, 4, 8)), (make(), make())
    for model, call in zip(models, (step, check_values(step))):
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        named = {"optimizer": optimizer, "x": x}
        losses = [call(model, **named) if by_name else call(model, optimizer, x) for _ in range(3)]
        assert losses[0] > losses[1] > losses[2]
        assert optimizer.step[...] == 3
    for got, expected in zip(jax.tree.leaves(nnx.state(models[1])), jax.tree.leaves(nnx.state(models[0])), strict=True):
        assert jnp.allclose(got, expected, atol=1e-5)


def test_a_step_that_fails_leaves_the_model_as_it_was():
    model = make_model()
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    with pytest.raises(AssertionError, match="non-finite"):
        check_values(train)(model, optimizer, jnp.full((2, 4, 8), jnp.nan))
    assert all(map(jnp.array_equal, jax.tree.leaves(before), jax.tree.leaves(nnx.state(model))))
    assert optimizer.step[...] == 0


@pytest.mark.parametrize("pass_it", [True, False], ids=["an argument", "the function"])
def test_dropout_draws_a_new_mask_in_every_call(pass_it):
    model = gemma_mlp.nnx.MLPBlock(dataclasses.replace(CONFIG, dropout_rate=0.5), rngs=nnx.Rngs(0))
    alike = nnx.clone(model)
    checked = check_values(lambda model, x: model(x)) if pass_it else check_values(model)
    for _ in range(3):
        got = checked(model, jnp.ones((2, 8))) if pass_it else checked(jnp.ones((2, 8)))
        assert jnp.allclose(got, alike(jnp.ones((2, 8))), rtol=1e-5)


def test_what_could_not_be_updated_is_refused():
    """A function that changes a model which it did not get as an argument; and a model among the results."""
    model = gemma_mlp.nnx.MLPBlock(dataclasses.replace(CONFIG, dropout_rate=0.5), rngs=nnx.Rngs(0))
    with pytest.raises(flax.errors.TraceContextError, match="trace level"):
        check_values(lambda x: model(x))(jnp.ones((2, 8)))
    with pytest.raises(ValueError, match=r"must return arrays.*updated in place"):
        check_values(lambda model: model)(model)
