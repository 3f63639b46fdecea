"""The activations of the GLU family, by name, with their derivatives.

Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202), section 2: every member of the family is
`activation(x @ W + b) * (x @ V + c)`. GELU is defined in Hendrycks and Gimpel (arXiv:1606.08415, section 2).

To add one: the name in `Activation`, the entry in `ACTIVATIONS`, if Pallas cannot lower it `LOWERED` in
op/gpu_kernels.py or `lacks` of the `Backend` that cannot (with the limits in op/README.md), the oracle's own formula
in testing/oracle.py, literal values in tests/test_activations.py, and the lists in feed_forward's docstring, the
README and tests/test_config.py.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Activation = Literal["gelu_tanh", "gelu", "silu", "relu", "sigmoid", "identity"]
SQRT_2_OVER_PI, CUBIC = math.sqrt(2 / math.pi), 0.044715  # of GELU's tanh form


@dataclasses.dataclass(frozen=True)
class GateActivation:
    """One member of the GLU family. Calling it applies `function`.

    Every backend's backward pass uses `derivative`. (With `save="autodiff"` JAX differentiates `function` itself.)
    `huggingface` is what a config.json calls it (transformers' ACT2FN), or None where none of theirs is read.
    """

    function: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    huggingface: str | None = None

    def __call__(self, x: Array) -> Array:
        return self.function(x)

    def gated(self, gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        """h = activation(gate) * up."""
        return self.function(gate) * up

    def gated_gradients(self, gate: Array, up: Array, dh: Array) -> tuple[Array, Array]:
        """The gradients of gate and up, for the gradient dh of h."""
        return dh * up * self.derivative(gate), dh * self.function(gate)


def gelu_tanh(x: Array) -> Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): GELU as Gemma computes it.

    It differs from the erf form by up to 4.73e-4, near x = -2.70.
    """
    return x * (0.5 * (1 + _tanh_of_cubic(x)))


def gelu_tanh_derivative(x: Array) -> Array:
    tanh = _tanh_of_cubic(x)
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * SQRT_2_OVER_PI * (1 + 3 * CUBIC * x * x)


def _tanh_of_cubic(x):
    return jnp.tanh(SQRT_2_OVER_PI * (x + CUBIC * x**3))


def erf_gelu(normal_cdf: Callable[[Array], Array], huggingface: str | None = None) -> GateActivation:
    """x (1 + erf(x / sqrt(2))) / 2: GELU in its exact form, by way of a `normal_cdf` that the compiler knows."""

    def derivative(x):
        return normal_cdf(x) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)

    return GateActivation(lambda x: x * normal_cdf(x), derivative, huggingface)


def normal_cdf_by_erfc(x: Array) -> Array:
    """erfc keeps the digits of the negative tail, which 1 + erf loses."""
    return 0.5 * lax.erfc(-x * math.sqrt(0.5))


def normal_cdf_by_erf(x: Array) -> Array:
    """For compilers that have no erfc."""
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


def silu_derivative(x: Array) -> Array:
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def relu_derivative(x: Array) -> Array:
    """1 for x > 0, else 0."""
    return jnp.where(x > 0, 1.0, 0.0).astype(x.dtype)


def sigmoid_derivative(x: Array) -> Array:
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1 - sigmoid)


ACTIVATIONS: dict[Activation, GateActivation] = {
    "gelu_tanh": GateActivation(gelu_tanh, gelu_tanh_derivative, "gelu_pytorch_tanh"),  # GEGLU, tanh form (Gemma)
    "gelu": erf_gelu(normal_cdf_by_erfc, "gelu"),  # GEGLU, erf form
    "silu": GateActivation(jax.nn.silu, silu_derivative, "silu"),  # SwiGLU
    "relu": GateActivation(jax.nn.relu, relu_derivative, "relu"),  # ReGLU
    "sigmoid": GateActivation(jax.nn.sigmoid, sigmoid_derivative),  # GLU
    "identity": GateActivation(lambda x: x, jnp.ones_like),  # Bilinear
}
