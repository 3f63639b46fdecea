"""The activations have the values of the GLU family, and GELU's tanh form is 4.73e-4 off at most."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import ACTIVATIONS
from gemma_mlp.activations import Activation
from gemma_mlp.testing import oracle

GLU_FAMILY = {"gelu_tanh", "gelu", "silu", "relu", "sigmoid", "identity"}
LITERALS = {  # activation(1), activation(-2), computed by hand to ten digits
    "gelu_tanh": (0.8411919906, -0.0454023059),
    "gelu": (0.8413447461, -0.0455002639),
    "silu": (0.7310585786, -0.2384058440),
    "relu": (1.0, 0.0),
    "sigmoid": (0.7310585786, 0.1192029220),
    "identity": (1.0, -2.0),
}


def test_the_family_is_shazeers():
    assert set(ACTIVATIONS) == GLU_FAMILY == set(LITERALS) == set(typing.get_args(Activation))


@pytest.mark.parametrize("name", sorted(GLU_FAMILY))
def test_values_equal_literals_and_the_oracle(name):
    with jax.enable_x64(True):
        at_points = ACTIVATIONS[name](jnp.array([1.0, -2.0], jnp.float64))
        np.testing.assert_allclose(at_points, LITERALS[name], atol=5e-11)
        x = np.linspace(-12, 12, 4801)
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), oracle.ACTIVATIONS[name][0](x), atol=4e-15)


@pytest.mark.parametrize("name", sorted(GLU_FAMILY))
def test_derivatives_equal_the_oracle(name):
    """Every backward pass takes `derivative`, except that of `save="autodiff"`."""
    with jax.enable_x64(True):
        x = np.linspace(-12, 12, 4801)
        derivative = ACTIVATIONS[name].derivative(jnp.asarray(x))
        # 1 - tanh^2 of GELU loses digits where tanh is near 1; the largest error measured is 3.8e-14.
        np.testing.assert_allclose(derivative, oracle.ACTIVATIONS[name][1](x), atol=5e-14)


def test_the_tanh_form_is_off_by_4_73e_4_near_minus_2_70():
    with jax.enable_x64(True):
        x = jnp.linspace(-6, 0, 60_001, dtype=jnp.float64)
        gap = np.abs(ACTIVATIONS["gelu_tanh"](x) - ACTIVATIONS["gelu"](x))
        assert gap.max() == pytest.approx(4.73e-4, abs=5e-7)
        assert x[gap.argmax()] == pytest.approx(-2.70, abs=0.01)
