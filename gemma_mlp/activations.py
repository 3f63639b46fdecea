"""The activations that make up the GLU family, by name.

Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202), section 2: every member is
`activation(x @ W + b) * (x @ V + c)`.
"""

from collections.abc import Callable
from typing import Literal

import jax

Activation = Literal["gelu_tanh", "gelu", "silu", "relu", "sigmoid", "identity"]


def gelu_tanh(x: jax.Array) -> jax.Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): GELU as Gemma computes it (arXiv:1606.08415, section 2).

    Called `gelu_pytorch_tanh` by Hugging Face. It differs from the erf form by up to 4.73e-4, near x = -2.70.
    """
    return jax.nn.gelu(x, approximate=True)


def gelu(x: jax.Array) -> jax.Array:
    """x (1 + erf(x / sqrt(2))) / 2: GELU in its exact form (arXiv:1606.08415, section 2)."""
    return jax.nn.gelu(x, approximate=False)


def identity(x: jax.Array) -> jax.Array:
    """x: the gate of the bilinear layer."""
    return x


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": gelu_tanh,  # GEGLU, tanh form (Gemma)
    "gelu": gelu,  # GEGLU, erf form
    "silu": jax.nn.silu,  # SwiGLU
    "relu": jax.nn.relu,  # ReGLU
    "sigmoid": jax.nn.sigmoid,  # GLU
    "identity": identity,  # Bilinear
}
