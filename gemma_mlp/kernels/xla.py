"""The feed-forward as XLA compiles it on every backend, with its own backward pass.

Every product takes operands in the compute dtype and accumulates in float32; element-wise work is done in
float32; h, y and what the backward pass keeps are rounded once, where they are stored.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.config import Save
from gemma_mlp.dtypes import accumulation_dtype
from gemma_mlp.params import MLPParams


class Op(NamedTuple):
    """What is known of a feed-forward when it is traced."""

    activation: Activation
    dtype: Any
    dropout_rate: float
    save: Save


def feed_forward(
    op: Op, params: MLPParams, x: Float[Array, "*B D"], dropout_key: Key[Array, ""] | None
) -> Float[Array, "*B D"]:
    """y = (activation(x W_gate + b_gate) * (x W_up + b_up)) W_down + b_down, in `op.dtype`."""
    if op.save == "autodiff":
        return _forward(op, params, x, dropout_key)[0]
    return _feed_forward(op, params, x, dropout_key)


def hidden(
    op: Op, params: MLPParams, x: Float[Array, "*B D"], dropout_key: Key[Array, ""] | None
) -> Float[Array, "*B F"]:
    """h, in `op.dtype`: what the down projection receives."""
    gate_BF, up_BF = _project(op, params, x)
    return _gated(op, gate_BF, up_BF, dropout_key).astype(op.dtype)


def _forward(op, params, x, dropout_key):
    gate_BF, up_BF = _tag_gate_up(*_project(op, params, x))
    h_BF = checkpoint_name(_gated(op, gate_BF, up_BF, dropout_key).astype(op.dtype), "mlp_hidden")
    y_BD = _add(_multiply(op, h_BF, params.down_proj), params.down_bias)
    return checkpoint_name(y_BD.astype(op.dtype), "mlp_out"), gate_BF, up_BF


def _project(op, params, x):
    gate_BF = _add(_multiply(op, x, params.gate_proj), params.gate_bias)
    up_BF = _add(_multiply(op, x, params.up_proj), params.up_bias)
    return gate_BF, up_BF


def _tag_gate_up(gate_BF, up_BF):
    return checkpoint_name(gate_BF, "mlp_gate"), checkpoint_name(up_BF, "mlp_up")


def _gated(op, gate_BF, up_BF, dropout_key):
    h_BF = ACTIVATIONS[op.activation](gate_BF) * up_BF
    if op.dropout_rate == 0:
        return h_BF
    keep = 1 - op.dropout_rate
    return jnp.where(jax.random.bernoulli(dropout_key, keep, h_BF.shape), h_BF / keep, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(op, params, x, dropout_key):
    return _forward(op, params, x, dropout_key)[0]


def _feed_forward_forward(op, params, x, dropout_key):
    y_BD, gate_BF, up_BF = _forward(op, params, x, dropout_key)
    kept = None
    if op.save == "gate_up":
        kept = _tag_gate_up(gate_BF.astype(op.dtype), up_BF.astype(op.dtype))
    return y_BD, (params, x, dropout_key, kept)


def _feed_forward_backward(op, residuals, dy_BD):
    params, x_BD, dropout_key, kept = residuals
    wide = accumulation_dtype(op.dtype)
    if kept is None:
        gate_BF, up_BF = _project(op, params, x_BD)
    else:
        gate_BF, up_BF = (a.astype(wide) for a in kept)
    h_BF, pull_back = jax.vjp(lambda gate, up: _gated(op, gate, up, dropout_key), gate_BF, up_BF)
    dh_BF = _multiply(op, dy_BD, params.down_proj, transpose=True)
    dgate_BF, dup_BF = (d.astype(op.dtype) for d in pull_back(dh_BF))
    dx_BD = _multiply(op, dgate_BF, params.gate_proj, transpose=True)
    dx_BD += _multiply(op, dup_BF, params.up_proj, transpose=True)
    dparams = MLPParams(
        gate_proj=_outer(op, x_BD, dgate_BF, params.gate_proj),
        up_proj=_outer(op, x_BD, dup_BF, params.up_proj),
        down_proj=_outer(op, h_BF, dy_BD, params.down_proj),
        gate_bias=_total(dgate_BF, params.gate_bias),
        up_bias=_total(dup_BF, params.up_bias),
        down_bias=_total(dy_BD, params.down_bias),
    )
    return dparams, dx_BD.astype(x_BD.dtype), None


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


def _multiply(op, a, weight, transpose=False):
    """a @ weight, or a @ weight.T."""
    return _contract(op, a, weight, (a.ndim - 1,), (1 if transpose else 0,))


def _outer(op, a, b, weight):
    """a.T @ b, summed over all leading axes: a weight's gradient, in the weight's dtype."""
    tokens = tuple(range(a.ndim - 1))
    return _contract(op, a, b, tokens, tokens).astype(weight.dtype)


def _contract(op, a, b, a_axes, b_axes):
    return jax.lax.dot_general(
        a.astype(op.dtype),
        b.astype(op.dtype),
        ((a_axes, b_axes), ((), ())),
        preferred_element_type=accumulation_dtype(op.dtype),
    )


def _add(a, bias):
    if bias is None:
        return a
    return a + jnp.broadcast_to(bias.astype(a.dtype), a.shape)


def _total(d, bias):
    """A bias's gradient: the sum over all leading axes, in the bias's dtype."""
    if bias is None:
        return None
    wide = accumulation_dtype(d.dtype)
    return jnp.sum(d.astype(wide), axis=tuple(range(d.ndim - 1))).astype(bias.dtype)
