"""Gemma's RMSNorm."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_mlp.checks import describe, ensure_finite, require
from gemma_mlp.dtypes import accumulation_dtype, compute_dtype
from gemma_mlp.mesh import placed_automatically, spec_of


def rms_norm(
    scale: Float[Array, " D"], x: Float[Array, "*B D"], *, eps: float = 1e-6, dtype: Any = None
) -> Float[Array, "*B D"]:
    """y = x / sqrt(mean(x^2) + eps) * (1 + scale), in float32, rounded once.

    As in Gemma's checkpoints the weight is stored around zero. Order and precision are those of Hugging
    Face's `Gemma2RMSNorm`: all of it in float32 (float64 for float64 input), cast last.

    Args:
      scale: w, [D].
      x: any leading axes, [*B, D].
      eps: added to the mean square, under the root.
      dtype: of the result; None: the common type of `scale` and `x`.

    Raises:
      ValueError: if `scale` does not match the last axis of `x`, or for a dtype that is not supported.
    """
    require(
        x.ndim >= 1 and scale.shape == x.shape[-1:],
        "rms_norm scales the last axis of x: scale is [D] and x is [*B, D].",
        f"scale {describe(scale)}, x {describe(x)}",
        "check the config's embed_dim against the model's width.",
    )
    scale, x = ensure_finite("scale", scale), ensure_finite("x", x)
    dtype = compute_dtype(dtype, scale=scale, x=x)
    wide = accumulation_dtype(dtype, scale.dtype, x.dtype)

    def normalise(scale, x):
        x_BD, factor_BD = x.astype(wide), jnp.broadcast_to(1 + scale.astype(wide), x.shape)
        mean_square_B1 = jnp.mean(jnp.square(x_BD), axis=-1, keepdims=True)
        return (x_BD * jax.lax.rsqrt(mean_square_B1 + eps) * factor_BD).astype(dtype)

    return placed_automatically(normalise, lambda scale, x: spec_of(x))(scale, x)
