"""Who takes part: the GLU family from gemma_mlp, and the ungated feed-forward, composed from Flax, for comparison."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import gemma_mlp
from gemma_mlp import ACTIVATIONS, MLPConfig
from gemma_mlp.checks import require


class Contestant(NamedTuple):
    """A feed-forward by its activation, gated (activation(x W) * (x V)) or not (activation(x W))."""

    label: str
    activation: str
    gated: bool


# Shazeer's names (arXiv:2002.05202). The ungated GELU is the tanh form, so that GEGLU (tanh) differs by the gate alone.
CONTESTANTS = {
    "geglu_tanh": Contestant("GEGLU (tanh)", "gelu_tanh", gated=True),
    "geglu_erf": Contestant("GEGLU (erf)", "gelu", gated=True),
    "swiglu": Contestant("SwiGLU", "silu", gated=True),
    "reglu": Contestant("ReGLU", "relu", gated=True),
    "glu": Contestant("GLU", "sigmoid", gated=True),
    "bilinear": Contestant("Bilinear", "identity", gated=True),
    "gelu": Contestant("GELU, no gate", "gelu_tanh", gated=False),
    "silu": Contestant("SiLU, no gate", "silu", gated=False),
    "relu": Contestant("ReLU, no gate", "relu", gated=False),
}
REFERENCE = "geglu_tanh"  # what the others are compared with


class UngatedMLP(nnx.Module):
    """y = activation(x W_up) W_down, drawn with the variances of gemma_mlp's own weights: 1 / fan-in.

    Args:
      config: sizes and numerics; `activation` is applied to the one hidden projection.
      rngs: `params` draws the weights.
    """

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        options = {"use_bias": config.use_bias, "dtype": config.dtype, "param_dtype": config.param_dtype}
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nnx.Linear(config.embed_dim, config.hidden_dim, rngs=rngs, **options)
        self.down_proj = nnx.Linear(config.hidden_dim, config.embed_dim, rngs=rngs, **options)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nnx.Module):
    """x + post_norm(mlp(pre_norm(x))) around any feed-forward; with gemma_mlp's own it is `gemma_mlp.nnx.MLPBlock`.

    Args:
      config: sizes and numerics.
      rngs: `params` draws the weights.
      mlp: makes the feed-forward from the two.
      norms: False leaves both norms out.
      residual: False leaves the sum with x out.
    """

    def __init__(
        self,
        config: MLPConfig,
        *,
        rngs: nnx.Rngs,
        mlp: Callable = UngatedMLP,
        norms: bool = True,
        residual: bool = True,
    ):
        self.pre_norm = gemma_mlp.nnx.RMSNorm(config, rngs=rngs) if norms else nnx.data(None)
        self.mlp = mlp(config, rngs=rngs)
        self.post_norm = gemma_mlp.nnx.RMSNorm(config, rngs=rngs) if norms else nnx.data(None)
        self.residual = residual

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = self.mlp(self.pre_norm(x) if self.pre_norm is not None else x)
        y = self.post_norm(y) if self.post_norm is not None else y
        return x + y if self.residual else y


def mlp_config(name: str, embed_dim: int, gated_hidden_dim: int) -> MLPConfig:
    """The sizes of a contestant: without a gate two matrices share what three have, so hidden_dim is 3/2 as large.

    Parameters are then equal, and so are the FLOPs of the products, since a token meets each weight once.
    """
    require(
        gated_hidden_dim % 2 == 0,
        "A gated hidden size is even, so that 3/2 of it is whole.",
        str(gated_hidden_dim),
        "pass an even --config.hidden_dim.",
    )
    contestant = CONTESTANTS[name]
    hidden_dim = gated_hidden_dim if contestant.gated else gated_hidden_dim * 3 // 2
    return MLPConfig(
        embed_dim,
        hidden_dim,
        activation=contestant.activation,  # pyright: ignore[reportArgumentType]  # checked at construction
        dtype="float32",
        save="gate_up",
    )


def mlp_class(name: str) -> Callable:
    """The contestant's feed-forward: (config, rngs=rngs) -> module."""
    return gemma_mlp.nnx.MLP if CONTESTANTS[name].gated else UngatedMLP


def block_class(name: str) -> Callable:
    """The contestant's block with norms and residual: (config, rngs=rngs) -> module."""
    return gemma_mlp.nnx.MLPBlock if CONTESTANTS[name].gated else Block


def unit_gain(name: str) -> float:
    """What the last weights have to be multiplied by so that unit-variance input gives unit-variance output.

    gate, up and hidden projection of such an input are about standard normal, so it is 1 / sqrt(E[activation(z)^2]).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    values = np.asarray(jax.jit(ACTIVATIONS[CONTESTANTS[name].activation])(np.float32(nodes)), np.float64)  # pyright: ignore[reportArgumentType]
    return float((weights.sum() / (weights * values**2).sum()) ** 0.5)
