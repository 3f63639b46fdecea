"""The feed-forward as XLA compiles it on every backend, with its own backward pass.

Every product takes operands in the compute dtype and accumulates in float32; element-wise work is done in
float32; h, y and what the backward pass keeps are rounded once, where they are stored. Accelerators store gate, up
and dh between the products too, so there these are rounded once as well; a CPU keeps them in float32.

The optimisation barriers decide what is in memory; tests/aot holds the compilers to it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.lax import optimization_barrier
from jaxtyping import Array, Float, Key

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.config import Save
from gemma_mlp.dtypes import accumulation_dtype, widest
from gemma_mlp.params import MLPParams


class Op(NamedTuple):
    """What is known of a feed-forward when it is traced."""

    activation: Activation
    dtype: Any
    dropout_rate: float
    save: Save

    @property
    def wide(self):
        """The dtype of sums and of element-wise work."""
        return accumulation_dtype(self.dtype)


def feed_forward(
    op: Op, params: MLPParams, x: Float[Array, "*B D"], dropout_key: Key[Array, ""] | None
) -> Float[Array, "*B D"]:
    """y = (activation(x W_gate + b_gate) * (x W_up + b_up)) W_down + b_down, in `op.dtype`."""
    if op.save == "autodiff":
        return _forward(op, _in_wide, params, x, dropout_key)[0]
    return _feed_forward(op, params, x, dropout_key)


def hidden(
    op: Op, params: MLPParams, x: Float[Array, "*B D"], dropout_key: Key[Array, ""] | None
) -> Float[Array, "*B F"]:
    """h, in `op.dtype`: what the down projection receives."""
    return _by_platform(op, _hidden, params, x, dropout_key)[0]


def _forward(op, run, params, x, dropout_key):
    """y, gate and up. `run` is how pieces are run: :func:`_by_platform` or :func:`_in_wide`."""
    h_BF, gate_BF, up_BF = run(op, _hidden, params, x, dropout_key)
    h_BF = checkpoint_name(h_BF, "mlp_hidden")
    return checkpoint_name(run(op, _down, params, h_BF), "mlp_out"), gate_BF, up_BF


def _in_wide(op, function, *args):
    """function(op, stored, *args) with nothing rounded between products, for JAX to differentiate."""
    return function(op, op.wide, *args)


def _by_platform(op, function, *args):
    """function(op, stored, *args), where `stored` is what products between element-wise work are stored in."""
    on_cpu, on_accelerator = (functools.partial(function, op, stored) for stored in (op.wide, op.dtype))
    if op.dtype == op.wide:
        return on_cpu(*args)
    return jax.lax.platform_dependent(*args, cpu=on_cpu, default=on_accelerator)


def _hidden(op, stored, params, x, dropout_key):
    """h, gate and up, all in the compute dtype."""
    gate_BF = checkpoint_name(_project(op, stored, x, params.gate_proj, params.gate_bias), "mlp_gate")
    up_BF = checkpoint_name(_project(op, stored, x, params.up_proj, params.up_bias), "mlp_up")
    h_BF = _gated(op, gate_BF.astype(op.wide), up_BF.astype(op.wide), dropout_key)
    # Without the barrier gate and up both stay, for h to be computed inside the down projection.
    return optimization_barrier(h_BF.astype(op.dtype)), gate_BF.astype(op.dtype), up_BF.astype(op.dtype)


def _gated(op, gate_BF, up_BF, dropout_key):
    h_BF = ACTIVATIONS[op.activation](gate_BF) * up_BF
    if op.dropout_rate == 0:
        return h_BF
    keep = 1 - op.dropout_rate
    return jnp.where(jax.random.bernoulli(dropout_key, keep, h_BF.shape), h_BF / keep, 0)


def _down(op, stored, params, h_BF):
    return _project(op, stored, h_BF, params.down_proj, params.down_bias).astype(op.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(op, params, x, dropout_key):
    return _feed_forward_forward(op, params, x, dropout_key)[0]


def _feed_forward_forward(op, params, x, dropout_key):
    y_BD, gate_BF, up_BF = _forward(op, _by_platform, params, x, dropout_key)
    kept = None
    if op.save == "gate_up":
        kept = checkpoint_name(gate_BF, "mlp_gate"), checkpoint_name(up_BF, "mlp_up")
    return y_BD, (params, x, dropout_key, kept)


def _feed_forward_backward(op, residuals, dy_BD):
    return *_by_platform(op, _gradients, *residuals, dy_BD), None


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


def _gradients(op, stored, params, x_BD, dropout_key, kept, dy_BD):
    """The gradients of the parameters and of x."""
    # A 1 that the compiler cannot know: without it an unrolled stack shares what is computed again here with its
    # forward pass, and so keeps it in memory. (A barrier around x or gate and up would have them copied.)
    one, dy_BD = optimization_barrier((jnp.ones((), op.dtype), dy_BD))
    if kept is None:
        x_again_BD = x_BD.astype(op.dtype) * one
        kept = (
            _project(op, stored, x_again_BD, params.gate_proj, params.gate_bias),
            _project(op, stored, x_again_BD, params.up_proj, params.up_bias),
        )
    else:
        kept = tuple(a * one for a in kept)
    gate_BF, up_BF = (a.astype(op.wide) for a in kept)
    dh_BF = _multiply(op, stored, dy_BD, params.down_proj, transpose=True).astype(op.wide)
    h_BF, pull_back = jax.vjp(lambda gate, up: _gated(op, gate, up, dropout_key), gate_BF, up_BF)
    # Without the barrier gate, up and dh all stay, for the operands of the products below to be computed inside them.
    h_BF, dgate_BF, dup_BF = optimization_barrier(tuple(a.astype(op.dtype) for a in (h_BF, *pull_back(dh_BF))))
    dx_BD = _multiply(op, op.wide, dgate_BF, params.gate_proj, transpose=True)
    dx_BD += _multiply(op, op.wide, dup_BF, params.up_proj, transpose=True)
    dparams = MLPParams(
        gate_proj=_outer(op, stored, x_BD, dgate_BF, params.gate_proj),
        up_proj=_outer(op, stored, x_BD, dup_BF, params.up_proj),
        down_proj=_outer(op, stored, h_BF, dy_BD, params.down_proj),
        gate_bias=_total(dgate_BF, params.gate_bias),
        up_bias=_total(dup_BF, params.up_bias),
        down_bias=_total(dy_BD, params.down_bias),
    )
    return dparams, dx_BD.astype(x_BD.dtype)


def _project(op, result, x, weight, bias):
    """x @ weight + bias, in the dtype `result`."""
    if bias is None:
        return _multiply(op, result, x, weight)
    y = _multiply(op, op.wide, x, weight)
    return (y + jnp.broadcast_to(bias.astype(op.wide), y.shape)).astype(result)


def _multiply(op, result, a, weight, transpose=False):
    """a @ weight, or a @ weight.T."""
    return _contract(op, result, a, weight, (a.ndim - 1,), (1 if transpose else 0,))


def _outer(op, stored, a, b, weight):
    """a.T @ b, summed over all leading axes: a weight's gradient, in the weight's dtype."""
    tokens = tuple(range(a.ndim - 1))
    return _contract(op, widest(stored, weight.dtype), a, b, tokens, tokens).astype(weight.dtype)


def _contract(op, result, a, b, a_axes, b_axes):
    dimensions = ((a_axes, b_axes), ((), ()))
    return jax.lax.dot_general(a.astype(op.dtype), b.astype(op.dtype), dimensions, preferred_element_type=result)


def _total(d, bias):
    """A bias's gradient: the sum over all leading axes, in the bias's dtype."""
    if bias is None:
        return None
    wide = accumulation_dtype(d.dtype)
    return jnp.sum(d.astype(wide), axis=tuple(range(d.ndim - 1))).astype(bias.dtype)
