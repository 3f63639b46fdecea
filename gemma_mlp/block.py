"""RMSNorm, and the whole block around the MLP, as a config describes it. The MLP itself is in op/api.py."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from gemma_mlp.checks import describe, ensure_finite, require
from gemma_mlp.config import MLPConfig
from gemma_mlp.dtypes import accumulation_dtype, compute_dtype
from gemma_mlp.mesh import placed_automatically, spec_of
from gemma_mlp.op.api import mlp
from gemma_mlp.params import MLPBlockParams


def rms_norm(
    scale: Float[Array, " D"],
    x: Float[Array, "*B D"],
    *,
    eps: float = 1e-6,
    dtype: Any = None,
    scale_plus_one: bool = True,
) -> Float[Array, "*B D"]:
    """y = x / sqrt(mean(x^2) + eps) * (1 + scale), in float32, rounded once.

    As in the checkpoints of Gemma 1, 2 and 3, the weight is stored around zero. With `scale_plus_one=False`, as in
    Gemma 3n and 4, the last factor is `scale` itself. Order and precision are those of Hugging Face's `Gemma2RMSNorm`
    and `Gemma4RMSNorm`: everything in float32 (float64 for float64 input), cast last.

    Args:
      scale: w, [D].
      x: any leading axes, [*B, D].
      eps: added to the mean square, under the root.
      dtype: of the result; None: the common type of `scale` and `x`.
      scale_plus_one: whether to multiply by 1 + w instead of w.

    Raises:
      ValueError: if `scale` does not match the last axis of `x`, or for a dtype that is not supported.
    """
    return _rms_norm(eps, dtype, scale_plus_one, scale, x)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rms_norm(eps, dtype, scale_plus_one, scale, x):
    dtype = compute_dtype(dtype, scale=scale, x=x)
    require(
        x.ndim >= 1 and scale.shape == x.shape[-1:],
        "rms_norm scales the last axis of x, so scale must be [D] and x [*B, D].",
        f"scale {describe(scale)}, x {describe(x)}",
        "check the config's embed_dim against the model's width.",
    )
    scale, x = ensure_finite("scale", scale), ensure_finite("x", x)
    wide = accumulation_dtype(dtype, scale.dtype, x.dtype)

    def normalise(scale, x):
        x_BD, scale_D = x.astype(wide), scale.astype(wide)
        factor_BD = jnp.broadcast_to(1 + scale_D if scale_plus_one else scale_D, x.shape)
        mean_square_B1 = jnp.mean(jnp.square(x_BD), axis=-1, keepdims=True)
        return (x_BD * jax.lax.rsqrt(mean_square_B1 + eps) * factor_BD).astype(dtype)

    return placed_automatically(normalise, lambda scale, x: spec_of(x))(scale, x)


def mlp_block(
    params: MLPBlockParams, x: Float[Array, "*B D"], config: MLPConfig, *, dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "*B D"]:
    """y = x + post_norm(mlp(pre_norm(x))): the second half of a Gemma 2 decoder layer (arXiv:2408.00118).

    Gemma 1 has no post_norm. Norms and sum are float32; the residual stream keeps the dtype of x.

    With `save="input"`, the backward pass gets x, what the MLP receives and (if there is a post_norm) what it returns,
    [*B, D] each. It recomputes the norms. `jax.checkpoint` around the block saves x alone.

    Args:
      params: as `MLPBlockParams.init(config, key)` makes them.
      x: the residual stream, [*B, D].
      config: sizes and numerics.
      dropout_key: switches dropout on, at `config.dropout_rate`; None: off.

    Returns:
      The residual stream after the block, [*B, D], in the dtype of x.

    Raises:
      ValueError: as :func:`gemma_mlp.feed_forward` and :func:`gemma_mlp.rms_norm` do.
    """
    return _mlp_block(config, params, x, dropout_key)


@functools.partial(jax.jit, static_argnums=0)
def _mlp_block(config, params, x, dropout_key):
    return add_branch(
        x,
        lambda x: mlp(params.mlp, x, config, dropout_key=dropout_key),
        pre_scale=params.pre_norm.scale,
        post_scale=params.post_norm.scale if params.post_norm is not None else None,
        config=config,
    )


# The backward pass recomputes the norms: JAX would otherwise save several float32 [*B, D] arrays for each. Barriers
# (prevent_cse) would make unrolled stacks use more memory on TPUs.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def add_branch(
    x: Float[Array, "*B D"],
    branch: Callable[[Array], Array],
    *,
    pre_scale: Float[Array, " D"] | None,
    post_scale: Float[Array, " D"] | None,
    config: MLPConfig,
) -> Float[Array, "*B D"]:
    """x + post_norm(branch(pre_norm(x))) in float32, rounded once. `branch` gets its input in the compute dtype.

    There is no norm where its scale is None; without pre_norm, `branch` gets x.
    """
    x_BD, normed_BD = _before(config, pre_scale, x)
    return _after(config, jax.typeof(x).dtype, post_scale, x_BD, branch(normed_BD))


def add_modules(
    x: Float[Array, "*B D"],
    pre_norm: Callable,
    branch: Callable[[Array], Array],
    post_norm: Callable | None,
    *,
    own_norm: type,
    scale_of: Callable[[Any], Array | None],
    config: MLPConfig,
) -> Float[Array, "*B D"]:
    """x + post_norm(branch(pre_norm(x))) by a shell's modules.

    A norm of which `scale_of` gives the scale is computed here; any other is called. `own_norm` takes a `dtype`.
    """
    pre_scale, post_scale = scale_of(pre_norm), scale_of(post_norm)

    def called(x_BD):
        y_BD = branch(pre_norm(x_BD) if pre_scale is None else x_BD)
        if post_norm is None or post_scale is not None:
            return y_BD
        own = {"dtype": accumulation_dtype(y_BD.dtype, x.dtype)} if type(post_norm) is own_norm else {}
        return post_norm(y_BD, **own)

    return add_branch(x, called, pre_scale=pre_scale, post_scale=post_scale, config=config)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(_recomputed, static_argnums=0)
def _before(config, pre_scale, x):
    """x in float32, for the sum, and normalised in the compute dtype."""
    if pre_scale is None:
        return x.astype(accumulation_dtype(compute_dtype(config.dtype, x=x), x.dtype)), x
    dtype = compute_dtype(config.dtype, x=x, pre_scale=pre_scale)
    x_BD = x.astype(accumulation_dtype(dtype, x.dtype))  # here: its two gradients are added before they are rounded
    return x_BD, rms_norm(pre_scale, x_BD, dtype=dtype, eps=config.norm_eps, scale_plus_one=config.scale_plus_one)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _after(config, dtype, post_scale, x_BD, y_BD):
    """x + post_norm(y) in float32, then in `dtype`."""
    if post_scale is not None:
        plus_one = config.scale_plus_one
        norm = functools.partial(rms_norm, dtype=x_BD.dtype, eps=config.norm_eps, scale_plus_one=plus_one)
        y_BD = _recomputed(norm)(post_scale, y_BD)
    return (x_BD + y_BD.astype(x_BD.dtype)).astype(dtype)
