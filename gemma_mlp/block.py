"""The MLP and the whole block around it, as a config describes them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from gemma_mlp.config import MLPConfig
from gemma_mlp.dtypes import accumulation_dtype, compute_dtype
from gemma_mlp.op.api import feed_forward, hidden_activations
from gemma_mlp.params import MLPBlockParams, MLPParams
from gemma_mlp.rms_norm import rms_norm


def mlp(
    params: MLPParams, x: Float[Array, "*B D"], config: MLPConfig, *, dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "*B D"]:
    """:func:`gemma_mlp.feed_forward` with the options of `config`; without a `dropout_key`, dropout is off."""
    return feed_forward(
        params,
        x,
        save=config.save,
        chunk_size=config.chunk_size,
        implementation=config.implementation,
        **_options(config, dropout_key),
    )


def mlp_hidden(
    params: MLPParams, x: Float[Array, "*B D"], config: MLPConfig, *, dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "*B F"]:
    """The hidden activations of :func:`mlp`, [*B, F]."""
    return hidden_activations(params, x, implementation=config.implementation, **_options(config, dropout_key))


def mlp_block(
    params: MLPBlockParams, x: Float[Array, "*B D"], config: MLPConfig, *, dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "*B D"]:
    """y = x + post_norm(mlp(pre_norm(x))): the second half of a Gemma 2 decoder layer (arXiv:2408.00118).

    Gemma 1 has no post_norm. Norms and sum are float32; the residual stream keeps the dtype of x.

    With `save="input"` the backward pass keeps x, what the MLP receives and what it returns, [*B, D] each in the
    dtypes that they have; the norms are computed again. `jax.checkpoint` around the block leaves x alone.

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
    return add_branch(
        x,
        lambda x: mlp(params.mlp, x, config, dropout_key=dropout_key),
        pre_scale=params.pre_norm.scale,
        post_scale=params.post_norm.scale if params.post_norm is not None else None,
        config=config,
    )


# Of a norm JAX would keep several float32 [*B, D]. With barriers unrolled stacks take more memory on TPUs.
_computed_again = functools.partial(jax.checkpoint, prevent_cse=False)


def add_branch(
    x: Float[Array, "*B D"],
    branch: Callable[[Array], Array],
    *,
    pre_scale: Float[Array, " D"],
    post_scale: Float[Array, " D"] | None,
    config: MLPConfig,
) -> Float[Array, "*B D"]:
    """x + post_norm(branch(pre_norm(x))), float32 but for what the branch receives, rounded once."""
    wide = accumulation_dtype(x.dtype, config.dtype or x.dtype)
    dtype = compute_dtype(config.dtype, x=x, pre_scale=pre_scale)

    @_computed_again
    def before(pre_scale, x_BD):
        x_BD = x_BD.astype(wide)  # here, so that both of its gradients are added before they are rounded
        return x_BD, rms_norm(pre_scale, x_BD, eps=config.norm_eps, dtype=dtype)

    @_computed_again
    def after(post_scale, y_BD):
        return rms_norm(post_scale, y_BD, eps=config.norm_eps, dtype=wide)

    x_BD, normed_BD = before(pre_scale, x)
    y_BD = branch(normed_BD)
    if post_scale is not None:
        y_BD = after(post_scale, y_BD)
    return (x_BD + y_BD.astype(wide)).astype(x.dtype)


def _options(config: MLPConfig, dropout_key: Key[Array, ""] | None) -> dict[str, Any]:
    return {
        "activation": config.activation,
        "dtype": config.dtype,
        "dropout_rate": config.dropout_rate if dropout_key is not None else 0.0,
        "dropout_key": dropout_key,
        "axis_rules": config.axis_rules,
    }
