"""The feed-forward's arithmetic as XLA compiles it: h, y, and the gradients.

Every matmul takes operands in the compute dtype and accumulates in float32. Element-wise work is float32. Results are
rounded once, where they are stored. The optimisation barriers decide what is in memory, the sharding constraints
(`residual_stream`, which vjp.py calls too, `over_hidden`, `_whole_length`) what devices send to one another; tests/aot
holds the compilers to both.

`gradients` goes through F in slices if `chunk_size` or `backend.float32_slices` ask for it. The chunks of tokens of
the forward pass are in vjp.py. With `save="input"` the backward pass recomputes gate and up in `_hidden_gradients`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from gemma_mlp.activations import ACTIVATIONS
from gemma_mlp.dtypes import accumulation_dtype
from gemma_mlp.mesh import constrain, count_shards, target_device, vary_alike
from gemma_mlp.op.backend import Op
from gemma_mlp.op.matmuls import matmul, project, project_wide, slices_allowed, weight_gradient
from gemma_mlp.op.slices import LANES, SlicedAxis, ceil_div, in_slices, round_up
from gemma_mlp.params import MLPParams, axes_of_leaves
from gemma_mlp.weights import base_of, has_groups

V5P = {"TPU v5", "TPU v5p"}  # the device kinds that JAX knows a v5p by
V7X = "TPU7x"
HIDDEN_SLICES = 16  # of weights in groups. With 8 a v6e has a slice of gate in memory at 1,024 tokens of 27B


def hidden(
    op: Op, params: MLPParams, x_BD: Array, mask_BF: Array | None, *, save_gate_up: bool = False
) -> tuple[Array, ...]:
    """(h,), or (h, gate, up) if gate and up are saved, in the compute dtype. By XLA, or by the backend's kernel."""
    if op.backend.hidden is not None:
        return op.backend.hidden(op, params, x_BD.astype(op.dtype), save_gate_up)
    in_groups = any(has_groups(base_of(weight)) for weight in (params.gate_proj, params.up_proj))
    if in_groups and slices_allowed(op) and not op.on_cpu:
        # XLA for GPUs would transpose int4 arrays before it slices them so. There each matmul takes its own slices.
        apart = functools.partial(_hidden, op, save_gate_up=save_gate_up)
        together = functools.partial(_hidden_in_slices, op, save_gate_up=save_gate_up)
        return lax.platform_dependent(params, x_BD, mask_BF, cuda=apart, default=together)
    return _hidden(op, params, x_BD, mask_BF, save_gate_up=save_gate_up)


def _hidden_in_slices(op, params, x_BD, mask_BF, *, save_gate_up):
    """The same in slices of F: of gate, up and the weights in the compute dtype, only a slice exists at a time."""
    hidden_dim = params.gate_proj.shape[1]
    size = min(hidden_dim, round_up(ceil_div(hidden_dim, HIDDEN_SLICES), LANES))
    axes, last = axes_of_leaves(params), SlicedAxis(-1, 1)
    in_slice = op._replace(in_slices=True)

    def add_slice(start, size, whole):
        part = jax.tree.map(lambda a, axes: a if axes[-1] != "F" else last.take(a, start, size), params, axes)
        mask_part_BF = last.take(mask_BF, start, size)
        results = _hidden(in_slice, part, x_BD, mask_part_BF, save_gate_up=save_gate_up)
        return tuple(last.put(array, result, start) for array, result in zip(whole, results))

    zeros = (jnp.zeros((*x_BD.shape[:-1], hidden_dim), op.dtype),) * (3 if save_gate_up else 1)
    return in_slices(hidden_dim, size, add_slice, vary_alike((zeros, x_BD))[0])


def _hidden(op, params, x_BD, mask_BF, *, save_gate_up):
    # What is saved is rounded after the scales of quantised weights, what is only stored may be rounded before them.
    project_hidden = project if save_gate_up else project_wide
    gate_BF = project_hidden(op, op.between, x_BD, params.gate_proj, params.gate_bias)
    up_BF = project_hidden(op, op.between, x_BD, params.up_proj, params.up_bias)
    if op.config.save == "autodiff":  # JAX saves them; for `gate_up` they are tagged in vjp.py
        gate_BF, up_BF = checkpoint_name(gate_BF, "mlp_gate"), checkpoint_name(up_BF, "mlp_up")
    h_BF = ACTIVATIONS[op.config.activation].gated(gate_BF.astype(op.wide), up_BF.astype(op.wide))
    h_BF = over_hidden(op, _dropped(op, h_BF, mask_BF).astype(op.dtype))
    saved = (gate_BF.astype(op.dtype), up_BF.astype(op.dtype)) if save_gate_up else ()
    # Without the barrier XLA keeps gate and up in memory and computes h inside the down projection.
    return lax.optimization_barrier(h_BF), *saved


def down(op: Op, params: MLPParams, h_BF: Array) -> Array:
    """y = h W_down + b_down, in the compute dtype."""
    return residual_stream(op, project(op, op.between, h_BF, params.down_proj, params.down_bias).astype(op.dtype))


def dropout_mask(op: Op, params: MLPParams, x_BD: Array, dropout_key: Array | None) -> Array | None:
    """True where dropout keeps an element of h; None without dropout."""
    if op.dropout_rate == 0 or dropout_key is None:
        return None
    shape = (*x_BD.shape[:-1], params.gate_proj.shape[1])
    return over_hidden(op, jax.random.bernoulli(dropout_key, 1 - op.dropout_rate, shape))


def gradients(
    op: Op,
    params: MLPParams,
    x_BD: Array,
    mask_BF: Array | None,
    saved: list[Array],
    dy_BD: Array,
    *,
    wanted: MLPParams,
) -> tuple[MLPParams, Array]:
    """The gradients of the parameters, in their dtypes, and of x, in its own. `saved`: gate and up, or nothing.

    `wanted` is a tree like `params` of True and False. The gradient of an array that is not wanted is None.
    """
    hidden_dim = params.gate_proj.shape[1]
    shards = count_shards("mlp", op.config.axis_rules)
    shard_F = hidden_dim // shards
    slice_F = _slice_size(op, params, x_BD, shard_F, saved)
    down_bias = _bias_gradient(wanted.down_bias, dy_BD, params.down_bias)
    if down_bias is not None:
        wanted = dataclasses.replace(wanted, down_bias=False)
    if slice_F >= shard_F:
        dparams, dx_BD = _gradients_of_slice(op, params, wanted, x_BD, mask_BF, saved, dy_BD)
    else:
        axes, last = axes_of_leaves(params), SlicedAxis(-1, shards)

        def take(array, axes, start, size):
            if "F" not in axes:
                return array
            share = hidden_dim // array.shape[axes.index("F")]  # a scale is for so many along F; else 1
            return SlicedAxis(axes.index("F"), shards).take(array, start // share, size // share)

        def add(start, array, axes, total, part):
            if total is None:
                return None
            if "F" not in axes:
                return total + part
            return SlicedAxis(axes.index("F"), shards).put(total, part.astype(total.dtype), start)

        def add_slice(start, size, sums):
            part = jax.tree.map(lambda a, axes: take(a, axes, start, size), params, axes)
            mask_part_BF, *saved_part = (last.take(a, start, size) for a in (mask_BF, *saved))
            dpart, dx_part_BD = _gradients_of_slice(op, part, wanted, x_BD, mask_part_BF, saved_part, dy_BD)
            dparams, dx_BD = sums
            return jax.tree.map(functools.partial(add, start), params, axes, dparams, dpart), dx_BD + dx_part_BD

        def zeros(array, axes, wanted):
            return jnp.zeros(array.shape, array.dtype if "F" in axes else op.wide) if wanted else None

        sums = jax.tree.map(zeros, params, axes, wanted), jnp.zeros(x_BD.shape, op.wide)
        dparams, dx_BD = in_slices(shard_F, slice_F, add_slice, vary_alike((sums, x_BD))[0])
    dx_BD = dx_BD.astype(x_BD.dtype)
    if op.backend.weight_backward is not None:
        # Without the barrier XLA may carry dx in VMEM through a loop over layers and then copy it to HBM.
        dx_BD = lax.optimization_barrier(dx_BD)
    dparams = dataclasses.replace(dparams, down_bias=down_bias)
    dparams = jax.tree.map(lambda a, d: None if d is None else d.astype(a.dtype), params, dparams)
    if _in_order(op):
        one, _ = lax.optimization_barrier((jnp.ones((), dx_BD.dtype), dparams))
        dx_BD *= one  # now it waits for the other gradients, and the layer before waits for it
    return dparams, dx_BD


def _gradients_of_slice(op, params, wanted, x_BD, mask_BF, saved, dy_BD):
    """This slice's gradients of the parameters, except down_bias, and its share of x's, not yet rounded."""
    if saved and op.backend.weight_backward is not None:
        dgate_BF, dup_BF, ddown_FD = op.backend.weight_backward(op, params, dy_BD.astype(op.dtype), *saved)
    else:
        h_BF, dgate_BF, dup_BF = _hidden_gradients(op, params, x_BD, mask_BF, saved, dy_BD)
        ddown_FD = weight_gradient(op, params.down_proj, wanted.down_proj, h_BF, dy_BD)
    if _in_order(op):
        x_BD, _ = lax.optimization_barrier((x_BD, ddown_FD))
    dparams = MLPParams(
        gate_proj=weight_gradient(op, params.gate_proj, wanted.gate_proj, x_BD, dgate_BF),
        up_proj=weight_gradient(op, params.up_proj, wanted.up_proj, x_BD, dup_BF),
        down_proj=ddown_FD,
        gate_bias=_bias_gradient(wanted.gate_bias, dgate_BF, params.gate_bias),
        up_bias=_bias_gradient(wanted.up_bias, dup_BF, params.up_bias),
    )
    dx_BD = matmul(op, op.wide, dgate_BF, params.gate_proj, transpose=True)
    return dparams, residual_stream(op, dx_BD + matmul(op, op.wide, dup_BF, params.up_proj, transpose=True))


def _hidden_gradients(op, params, x_BD, mask_BF, saved, dy_BD):
    """h and the gradients of gate and up, in the compute dtype."""
    if saved and op.backend.hidden_backward is not None:
        return op.backend.hidden_backward(op, params, dy_BD.astype(op.dtype), *saved)
    between = op.wide if op.backend.float32_slices else op.between
    dh_BF = over_hidden(op, matmul(op, between, dy_BD, params.down_proj, transpose=True))
    # A 1 that depends on dh and that XLA cannot fold: what it multiplies is computed after dh. Without it XLA merges
    # the recomputed gate and up with those of the forward pass, and keeps them in memory in an unrolled stack. A CPU
    # may merge them, because there time matters more, but it must not compute more of the backward pass that early.
    one, dh_BF = lax.optimization_barrier((jnp.ones((), op.dtype), dh_BF))

    def after_dh(array):
        return array * one.astype(array.dtype)

    if saved:
        gate_BF, up_BF = map(after_dh, saved)
    else:
        again_BD = x_BD.astype(op.dtype)
        again_BD = _whole_length(op, again_BD if op.on_cpu else after_dh(again_BD))
        gate_BF = project_wide(op, between, again_BD, params.gate_proj, params.gate_bias)
        up_BF = project_wide(op, between, again_BD, params.up_proj, params.up_bias)
        if op.on_cpu:
            gate_BF, up_BF = after_dh(gate_BF), after_dh(up_BF)
    gate_BF, up_BF, dh_BF = (a.astype(op.wide) for a in (gate_BF, up_BF, dh_BF))
    activation = ACTIVATIONS[op.config.activation]
    h_BF = _dropped(op, activation.gated(gate_BF, up_BF), mask_BF)
    dgate_BF, dup_BF = activation.gated_gradients(gate_BF, up_BF, _dropped(op, dh_BF, mask_BF))
    # Without the barrier XLA keeps gate, up and dh, and computes these three inside the matmuls that read them.
    return lax.optimization_barrier(tuple(a.astype(op.dtype) for a in (h_BF, dgate_BF, dup_BF)))


def _dropped(op, array_BF, mask_BF):
    """Dropout of h, and equally of its gradient."""
    return array_BF if mask_BF is None else jnp.where(mask_BF, array_BF / (1 - op.dropout_rate), 0)


def _slice_size(op, params, x_BD, shard_F, saved):
    """How much of each shard of F one slice of the backward pass takes: a multiple of LANES, and of the groups that
    share a scale. There are as many slices as chunks of tokens, or `backend.float32_slices` if that is more."""
    if saved and op.backend.weight_backward is not None:
        return shard_F
    size = op.config.chunk_size
    chunks = 1 if size is None or x_BD.ndim < 2 else ceil_div(x_BD.shape[-2], size)
    least = 1 if saved else op.backend.float32_slices or 1
    base = base_of(params.down_proj)
    group = base.group_size if has_groups(base) else 1
    return round_up(ceil_div(shard_F, max(chunks, least)), math.lcm(LANES, group))


def _in_order(op):
    """Whether W_down's gradient has to come before those of W_gate and W_up, and dx after all of them: see the table of
    barriers in this folder's README. On a v5p a mesh would gather x once more for it, and the kernel for `gate_up`
    would take another [T, D]."""
    kind = target_device().device_kind
    alone = op.config.axis_rules is None and op.backend.weight_backward is None
    return kind == V7X or (kind in V5P and alone)


def residual_stream(op: Op, array_BD: Array) -> Array:
    """`array`, sharded like the residual stream."""
    return constrain(array_BD, None, op.config.axis_rules)


def over_hidden(op: Op, array_BF: Array) -> Array:
    """`array`, sharded like the hidden activations."""
    return constrain(array_BF, "mlp", op.config.axis_rules)


def _whole_length(op, array_BD):
    """The residual stream with its length axis gathered onto every device."""
    rules = op.config.axis_rules
    return constrain(array_BD, None, rules and tuple((n, None if n == "length" else axes) for n, axes in rules))


def _bias_gradient(wanted, d, bias):
    """The sum over all leading axes, in the bias's dtype."""
    if not wanted:
        return None
    wide = accumulation_dtype(d.dtype)
    return jnp.sum(d.astype(wide), axis=tuple(range(d.ndim - 1))).astype(bias.dtype)
