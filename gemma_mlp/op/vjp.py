"""The feed-forward with its own backward pass: save policies, chunks of tokens, and the choice of the platform.

- `save="input"` saves only the arguments; the backward pass recomputes gate and up (`xla._hidden_gradients`, or
  `backend.backward`). `save="gate_up"` also saves gate and up. With `save="autodiff"` JAX differentiates `_forward`.
- Without a gradient one switch between a CPU and other platforms surrounds all of `_forward`. Under a gradient h and y
  each have their own, because a user's remat policy cannot see the tags inside a switch.
- `_forward` loops over chunks of tokens. The backward pass loops over slices of F instead, in `xla.gradients`.

README.md in this folder has the table of what runs when.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Key

from gemma_mlp.checks import require
from gemma_mlp.mesh import count_shards, token_axis, vary_alike
from gemma_mlp.op import cpu, xla
from gemma_mlp.op.backend import XLA, Op
from gemma_mlp.op.slices import SlicedAxis, ceil_div, in_slices
from gemma_mlp.params import MLPParams
from gemma_mlp.weights import QuantizedWeight


def run(op: Op, params: MLPParams, x: Float[Array, "*B D"], dropout_key: Key[Array, ""] | None) -> Float[Array, "*B D"]:
    """y, in `op.dtype`."""
    if op.config.save == "autodiff":
        return _forward(op._replace(on_cpu=None, round_between=False), _frozen(params), x, dropout_key)[0]
    return _feed_forward(op, params, x, dropout_key)


def run_hidden(
    op: Op, params: MLPParams, x: Float[Array, "*B D"], dropout_key: Key[Array, ""] | None
) -> Float[Array, "*B F"]:
    """h, in `op.dtype`."""
    if op.backend.hidden is not None:
        return _hidden_by_kernel(op, params, x)
    return _by_platform(op, xla.hidden, _frozen(params), x, xla.dropout_mask(op, params, x, dropout_key))[0]


def _frozen(params: MLPParams) -> MLPParams:
    """`params`, of which the quantised weights refuse to be differentiated where JAX differentiates by itself."""
    return jax.tree.map(lambda w: _identity(w) if _is_quantized(w) else w, params, is_leaf=_is_quantized)


def _is_quantized(node):
    return isinstance(node, QuantizedWeight)


@jax.custom_vjp
def _identity(weight):
    return weight


def _forward_of_identity(weight):
    _refuse_frozen(weight)
    return custom_vjp_primal_tree_values(weight), None


_identity.defvjp(_forward_of_identity, lambda _, cotangent: (None,), symbolic_zeros=True)


def _refuse_frozen(primals):
    """Raises ValueError if a derivative with respect to a quantised weight is asked for."""
    weights = filter(_is_quantized, jax.tree.leaves(primals, is_leaf=_is_quantized))
    require(
        not any(primal.perturbed for primal in jax.tree.leaves(list(weights))),
        "Quantised weights are frozen: they have no gradient.",
        "a derivative with respect to a quantised weight or its scales",
        "differentiate with respect to x, norms and adapters (add_lora) alone, or call dequantize.",
    )


def _directly(op, function, *args):
    return function(op, *args)


def _by_platform(op, function, *args, differs=False):
    """function(op, *args), in two branches, for a CPU and for other platforms, where their programs differ.

    In bfloat16 they do, because a CPU does not round between matmuls. Otherwise the caller says whether they differ.
    Kernels are for one platform and need no branches.
    """
    if op.backend != XLA or not (differs or op.dtype == jnp.bfloat16):
        return function(op, *args)
    on_cpu = functools.partial(function, op._replace(on_cpu=True, round_between=False))
    return lax.platform_dependent(*args, cpu=on_cpu, default=functools.partial(function, op))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(op, params, x, dropout_key):
    in_chunks = op.config.chunk_size is None and cpu.chunk_size(x.shape, op.dtype) is not None
    return _by_platform(op, _forward, params, x, dropout_key, differs=in_chunks)[0]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "x", "dropout_key", "saved"],
    meta_fields=["wanted"],
)
@dataclasses.dataclass(frozen=True)
class _Residuals:
    params: MLPParams
    x: Array
    dropout_key: Array | None
    saved: list[Array]  # gate and up, or nothing
    wanted: MLPParams  # True for each array of `params` whose gradient is asked for


def _save_for_backward(op, params, x, dropout_key):
    _refuse_frozen(params)
    wanted = jax.tree.map(lambda primal: primal.perturbed, params)
    params, x, dropout_key = custom_vjp_primal_tree_values((params, x, dropout_key))
    save_gate_up = op.config.save == "gate_up"  # else `input`, which saves nothing more
    y_BD, *saved = _forward(op, params, x, dropout_key, call=_by_platform, save_gate_up=save_gate_up)
    saved = [checkpoint_name(a, name) for a, name in zip(saved, ("mlp_gate", "mlp_up"))]
    return y_BD, _Residuals(params, x, dropout_key, saved, wanted)


def _backward(op, residuals, dy_BD):
    params, x, saved, wanted = residuals.params, residuals.x, residuals.saved, residuals.wanted
    if isinstance(dy_BD, SymbolicZero):
        dy_BD = jnp.zeros(x.shape, op.dtype)
    if not all(jax.tree.leaves(wanted)):  # these kernels compute the gradients of all weights
        op = op._replace(backend=op.backend._replace(backward=None, weight_backward=None))
    if op.backend.backward is not None and not saved:
        dparams, dx_BD = op.backend.backward(op, params, x.astype(op.dtype), dy_BD.astype(op.dtype))
        return dparams, dx_BD.astype(x.dtype), None
    mask_BF = xla.dropout_mask(op, params, x, residuals.dropout_key)
    gradients = functools.partial(xla.gradients, wanted=wanted)
    return *_by_platform(op, gradients, params, x, mask_BF, saved, dy_BD, differs=not saved), None


_feed_forward.defvjp(_save_for_backward, _backward, symbolic_zeros=True)


def _forward(op, params, x_BD, dropout_key, *, call=_directly, save_gate_up=False):
    """(y,), or (y, gate, up) if gate and up are saved. The functions for h and for y are called by `call`."""
    x_BD = xla.residual_stream(op, x_BD)
    if op.backend.forward is not None:
        y_BD, *gate_up = op.backend.forward(op, params, x_BD.astype(op.dtype), save_gate_up)
        return checkpoint_name(xla.residual_stream(op, y_BD), "mlp_out"), *gate_up
    mask_BF = xla.dropout_mask(op, params, x_BD, dropout_key)

    def compute(x_BD, mask_BF):
        hidden = functools.partial(xla.hidden, save_gate_up=save_gate_up)
        h_BF, *gate_up = call(op, hidden, params, x_BD, mask_BF)
        h_BF = checkpoint_name(h_BF, "mlp_hidden")
        return checkpoint_name(call(op, xla.down, params, h_BF), "mlp_out"), *gate_up

    chunk_size = op.config.chunk_size
    if chunk_size is None and op.on_cpu:
        chunk_size = cpu.chunk_size(x_BD.shape, op.dtype)
    if chunk_size is None or x_BD.ndim < 2 or x_BD.shape[-2] <= chunk_size:
        return compute(x_BD, mask_BF)
    tokens = SlicedAxis(-2, count_shards(token_axis(x_BD.ndim, x_BD.ndim - 2), op.config.axis_rules))

    def chunk(start, size, results):
        parts = compute(tokens.take(x_BD, start, size), tokens.take(mask_BF, start, size))
        return tuple(tokens.put(whole, part, start) for whole, part in zip(results, parts))

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute, x_BD, mask_BF))
    results = vary_alike((zeros, x_BD))[0]
    return in_slices(x_BD.shape[-2] // tokens.shards, ceil_div(chunk_size, tokens.shards), chunk, results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hidden_by_kernel(op, params, x):
    return xla.hidden(op, params, x, None)[0]


def _hidden_by_kernel_backward(op, residuals, dh_BF):
    by_xla = op._replace(backend=XLA)
    return jax.vjp(lambda params, x: xla.hidden(by_xla, params, x, None)[0], *residuals)[1](dh_BF)


_hidden_by_kernel.defvjp(
    lambda op, params, x: (_hidden_by_kernel(op, params, x), (params, x)), _hidden_by_kernel_backward
)
