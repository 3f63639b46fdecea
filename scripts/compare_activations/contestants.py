"""The contestants: the GLU family from gemma_mlp, and feed-forwards without a gate, composed from Flax modules."""

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
    """A feed-forward whose hidden values are activation(x W) * (x V) with a gate, or activation(x W) without one."""

    label: str
    activation: str
    gated: bool


# Shazeer's names (arXiv:2002.05202). GELU without a gate is the tanh form too, so that only the gate differs.
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
REFERENCE = "geglu_tanh"  # the others are compared with this one


class UngatedMLP(nnx.Module):
    """y = activation(x W_up) W_down. The initial weights have variance 1 / fan-in, as gemma_mlp's own have.

    Args:
      config: sizes and numerics; `activation` is applied to the one hidden projection.
      rngs: the stream `params` draws the weights.
    """

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        options = {"use_bias": config.use_bias, "dtype": config.dtype, "param_dtype": config.param_dtype}
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nnx.Linear(config.embed_dim, config.hidden_dim, rngs=rngs, **options)
        self.down_proj = nnx.Linear(config.hidden_dim, config.embed_dim, rngs=rngs, **options)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nnx.Module):
    """x + post_norm(mlp(pre_norm(x))) around any feed-forward. `gemma_mlp.nnx.MLPBlock` does it around its own.

    Args:
      config: sizes and numerics.
      rngs: the stream `params` draws the weights.
      mlp: the class of the feed-forward, called as mlp(config, rngs=rngs).
      norms: False leaves both norms out.
      residual: False leaves out the addition of x.
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
    """The sizes of a contestant. Without a gate it has two matrices instead of three, and 3/2 of the gated hidden_dim.

    Then all contestants have equally many parameters. Their matmuls take equally many FLOPs, because each token is
    multiplied by each weight once.
    """
    require(
        gated_hidden_dim % 2 == 0,
        "config.hidden_dim must be even, so that 3/2 of it is a whole number.",
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
    """The class of the contestant's feed-forward, called as mlp(config, rngs=rngs)."""
    return gemma_mlp.nnx.MLP if CONTESTANTS[name].gated else UngatedMLP


def block_class(name: str) -> Callable:
    """The class of the contestant's block with norms and residual, called as block(config, rngs=rngs)."""
    return gemma_mlp.nnx.MLPBlock if CONTESTANTS[name].gated else Block


def unit_gain(name: str) -> float:
    """The factor for the last weights that makes an input of unit variance give an output of unit variance.

    The projections of such an input are about standard normal, so the factor is 1 / sqrt(E[activation(z)^2]). With a
    gate the other projection is multiplied in; its variance is 1, so the factor is the same.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    values = np.asarray(jax.jit(ACTIVATIONS[CONTESTANTS[name].activation])(np.float32(nodes)), np.float64)  # pyright: ignore[reportArgumentType]
    return float((weights.sum() / (weights * values**2).sum()) ** 0.5)
