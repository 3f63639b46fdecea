"""The feed-forward's arithmetic as XLA compiles it: h, y, and the gradients.

Every matmul takes operands in the compute dtype and accumulates in float32. Element-wise work is float32. Results are
rounded once, where they are stored. The optimisation barriers decide what is in memory, the sharding constraints
(`residual_stream`, which vjp.py calls too, `over_hidden`, `_whole_length`) what devices send to one another; tests/aot
holds the compilers to both.

`gradients` goes through F in slices if `chunk_size` or `backend.float32_slices` ask for it. The chunks of tokens of
the forward pass are in vjp.py. With `save="input"` the backward pass recomputes gate and up in `_hidden_gradients`.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from gemma_mlp.activations import ACTIVATIONS
from gemma_mlp.dtypes import accumulation_dtype, widest
from gemma_mlp.mesh import constrain, count_shards, target_device, vary_alike
from gemma_mlp.op import cpu
from gemma_mlp.op.backend import Op
from gemma_mlp.op.slices import LANES, SlicedAxis, ceil_div, in_slices, round_up
from gemma_mlp.params import HIDDEN_AXIS, MLPParams

V5P = {"TPU v5", "TPU v5p"}  # the device kinds that JAX knows a v5p by
V7X = "TPU7x"


def hidden(
    op: Op, params: MLPParams, x_BD: Array, mask_BF: Array | None, *, save_gate_up: bool = False
) -> tuple[Array, ...]:
    """(h,), or (h, gate, up) if gate and up are saved, in the compute dtype. By XLA, or by the backend's kernel."""
    if op.backend.hidden is not None:
        return op.backend.hidden(op, params, x_BD.astype(op.dtype), save_gate_up)
    gate_BF = _project(op, op.between, x_BD, params.gate_proj, params.gate_bias)
    up_BF = _project(op, op.between, x_BD, params.up_proj, params.up_bias)
    if op.config.save == "autodiff":  # JAX saves them; for `gate_up` they are tagged in vjp.py
        gate_BF, up_BF = checkpoint_name(gate_BF, "mlp_gate"), checkpoint_name(up_BF, "mlp_up")
    h_BF = ACTIVATIONS[op.config.activation].gated(gate_BF.astype(op.wide), up_BF.astype(op.wide))
    h_BF = over_hidden(op, _dropped(op, h_BF, mask_BF).astype(op.dtype))
    saved = (gate_BF.astype(op.dtype), up_BF.astype(op.dtype)) if save_gate_up else ()
    # Without the barrier XLA keeps gate and up in memory and computes h inside the down projection.
    return lax.optimization_barrier(h_BF), *saved


def down(op: Op, params: MLPParams, h_BF: Array) -> Array:
    """y = h W_down + b_down, in the compute dtype."""
    return residual_stream(op, _project(op, op.between, h_BF, params.down_proj, params.down_bias).astype(op.dtype))


def dropout_mask(op: Op, params: MLPParams, x_BD: Array, dropout_key: Array | None) -> Array | None:
    """True where dropout keeps an element of h; None without dropout."""
    if op.dropout_rate == 0 or dropout_key is None:
        return None
    shape = (*x_BD.shape[:-1], params.gate_proj.shape[1])
    return over_hidden(op, jax.random.bernoulli(dropout_key, 1 - op.dropout_rate, shape))


def gradients(op: Op, params: MLPParams, x_BD: Array, mask_BF: Array | None, saved: list[Array], dy_BD: Array):
    """The gradients of the parameters, in their dtypes, and of x, in its own. `saved`: gate and up, or nothing."""
    shards = count_shards("mlp", op.config.axis_rules)
    shard_F = params.gate_proj.shape[1] // shards
    slice_F = _slice_size(op, x_BD, shard_F, saved)
    if slice_F >= shard_F:
        dparams, dx_BD = _gradients_of_slice(op, params, x_BD, mask_BF, saved, dy_BD)
    else:
        axes = {name: SlicedAxis(axis, shards) for name, axis in HIDDEN_AXIS.items()}
        sliced = {name: getattr(params, name) for name in axes}
        last = SlicedAxis(-1, shards)

        def add_slice(start, size, sums):
            part = MLPParams(**{name: axes[name].take(a, start, size) for name, a in sliced.items()})
            mask_part_BF, *saved_part = (last.take(a, start, size) for a in (mask_BF, *saved))
            dpart, dx_part_BD = _gradients_of_slice(op, part, x_BD, mask_part_BF, saved_part, dy_BD)
            dparams, dx_BD = sums
            dparams = {name: axes[name].put(a, dpart[name], start) for name, a in dparams.items()}
            return dparams, dx_BD + dx_part_BD

        zeros = jax.tree.map(jnp.zeros_like, sliced), jnp.zeros(x_BD.shape, op.wide)
        dparams, dx_BD = in_slices(shard_F, slice_F, add_slice, vary_alike((zeros, x_BD))[0])
    dx_BD = dx_BD.astype(x_BD.dtype)
    if op.backend.weight_backward is not None:
        # Without the barrier XLA may carry dx in VMEM through a loop over layers and then copy it to HBM.
        dx_BD = lax.optimization_barrier(dx_BD)
    gradients = MLPParams(**dparams, down_bias=_bias_gradient(dy_BD, params.down_bias)), dx_BD
    # Without the barrier a TPU 7x computes an unrolled stack's weight gradients last and keeps h, dgate and dup.
    return lax.optimization_barrier(gradients) if target_device().device_kind == V7X else gradients


def _gradients_of_slice(op, params, x_BD, mask_BF, saved, dy_BD):
    """The gradients of the parameters that have an axis F, by name, and this slice's share of x's, not yet rounded."""
    if saved and op.backend.weight_backward is not None:
        dgate_BF, dup_BF, ddown_FD = op.backend.weight_backward(op, params, dy_BD.astype(op.dtype), *saved)
    else:
        h_BF, dgate_BF, dup_BF = _hidden_gradients(op, params, x_BD, mask_BF, saved, dy_BD)
        ddown_FD = outer(op, h_BF, dy_BD, params.down_proj.dtype)
    x_BD = _behind_barrier_on_v5p(op, x_BD)
    dparams = {
        "gate_proj": outer(op, x_BD, dgate_BF, params.gate_proj.dtype),
        "up_proj": outer(op, x_BD, dup_BF, params.up_proj.dtype),
        "down_proj": ddown_FD,
        "gate_bias": _bias_gradient(dgate_BF, params.gate_bias),
        "up_bias": _bias_gradient(dup_BF, params.up_bias),
    }
    dx_BD = matmul(op, op.wide, dgate_BF, params.gate_proj, transpose=True)
    return dparams, residual_stream(op, dx_BD + matmul(op, op.wide, dup_BF, params.up_proj, transpose=True))


def _hidden_gradients(op, params, x_BD, mask_BF, saved, dy_BD):
    """h and the gradients of gate and up, in the compute dtype."""
    if saved and op.backend.hidden_backward is not None:
        return op.backend.hidden_backward(op, params, dy_BD.astype(op.dtype), *saved)
    between = op.wide if op.backend.float32_slices else op.between
    dh_BF = over_hidden(op, matmul(op, between, dy_BD, params.down_proj, transpose=True))
    # A 1 that depends on dh and that XLA cannot fold. Without it XLA merges the recomputed gate and up with those of
    # the forward pass, and keeps them in memory in an unrolled stack. A CPU may merge them: there time matters more.
    one = jnp.ones((), op.dtype)
    if not op.on_cpu:
        one, dh_BF = lax.optimization_barrier((one, dh_BF))
    if saved:
        gate_BF, up_BF = (a * one for a in saved)
    else:
        again_BD = _whole_length(op, x_BD.astype(op.dtype) * one)
        gate_BF = _project(op, between, again_BD, params.gate_proj, params.gate_bias)
        up_BF = _project(op, between, again_BD, params.up_proj, params.up_bias)
    gate_BF, up_BF, dh_BF = (a.astype(op.wide) for a in (gate_BF, up_BF, dh_BF))
    activation = ACTIVATIONS[op.config.activation]
    h_BF = _dropped(op, activation.gated(gate_BF, up_BF), mask_BF)
    dgate_BF, dup_BF = activation.gated_gradients(gate_BF, up_BF, _dropped(op, dh_BF, mask_BF))
    # Without the barrier XLA keeps gate, up and dh, and computes these three inside the matmuls that read them.
    return lax.optimization_barrier(tuple(a.astype(op.dtype) for a in (h_BF, dgate_BF, dup_BF)))


def _dropped(op, array_BF, mask_BF):
    """Dropout of h, and equally of its gradient."""
    return array_BF if mask_BF is None else jnp.where(mask_BF, array_BF / (1 - op.dropout_rate), 0)


def _slice_size(op, x_BD, shard_F, saved):
    """How much of each shard of F one slice of the backward pass takes, in multiples of LANES. There are as many slices
    as chunks of tokens, or `backend.float32_slices` if that is more."""
    if saved and op.backend.weight_backward is not None:
        return shard_F
    size = op.config.chunk_size
    chunks = 1 if size is None or x_BD.ndim < 2 else ceil_div(x_BD.shape[-2], size)
    least = 1 if saved else op.backend.float32_slices or 1
    return round_up(ceil_div(shard_F, max(chunks, least)), LANES)


def _behind_barrier_on_v5p(op, x_BD):
    """x behind an optimisation barrier on a TPU v5p, where XLA would else carry a [T, D] in VMEM through a loop over
    layers and then copy it to HBM. On other TPUs the barrier costs as often as it helps; meshes only lose by it."""
    if op.config.axis_rules is not None or target_device().device_kind not in V5P:
        return x_BD
    return lax.optimization_barrier(x_BD)


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


def _project(op, result, x, weight, bias):
    """x @ weight + bias, in the dtype `result`."""
    if bias is None:
        return matmul(op, result, x, weight)
    y = matmul(op, op.wide, x, weight)
    return (y + jnp.broadcast_to(bias.astype(op.wide), y.shape)).astype(result)


def matmul(op: Op, result, a: Array, weight: Array, transpose: bool = False) -> Array:
    """a @ weight, or a @ weight.T, over the last axis of a, in the dtype `result`."""

    def multiply(a, weight):
        return _dot(op, result, a, _rounded_on_tpu(op, weight), (a.ndim - 1,), (1 if transpose else 0,))

    if op.on_cpu is False or op.dtype != jnp.bfloat16 or math.prod(a.shape[:-1]) != 1:
        return multiply(a, weight)

    def padded(a, weight):
        return cpu.matmul_of_one_row(a, weight, multiply)

    return padded(a, weight) if op.on_cpu else lax.platform_dependent(a, weight, cpu=padded, default=multiply)


def _rounded_on_tpu(op, weight):
    """A float32 weight, rounded to bfloat16 and still float32, where a TPU multiplies in bfloat16. The cast that
    follows is then exact. With the cast alone XLA keeps a bfloat16 copy of every layer's weights before a loop."""
    if op.on_cpu is not False or (weight.dtype, op.dtype) != (jnp.float32, jnp.bfloat16):
        return weight
    return lax.reduce_precision(weight, 8, 7) if target_device().device_kind.startswith("TPU") else weight


def outer(op: Op, a: Array, b: Array, result) -> Array:
    """a.T @ b, summed over all leading axes, in the dtype `result`."""
    # Not with axis_rules: blocks of rows of D would cut across shards.
    if op.on_cpu and op.config.axis_rules is None and op.dtype == jnp.bfloat16 and math.prod(a.shape[:-1]) != 1:
        a, b = (array.reshape(-1, array.shape[-1]).astype(op.dtype) for array in (a, b))
        return cpu.outer_in_blocks(a, b, result, lambda a, b: _dot(op, jnp.float32, a, b, (1,), (0,)))
    tokens = tuple(range(a.ndim - 1))
    # Asked for a result in bfloat16, a CPU may accumulate in bfloat16 too, so it is asked for float32.
    sums = widest(op.wide if op.on_cpu else op.dtype, result)
    return _dot(op, sums, a, b, tokens, tokens).astype(result)


def _dot(op, result, a, b, a_axes, b_axes):
    dimensions = ((a_axes, b_axes), ((), ()))
    return lax.dot_general(a.astype(op.dtype), b.astype(op.dtype), dimensions, preferred_element_type=result)


def _bias_gradient(d, bias):
    """The sum over all leading axes, in the bias's dtype."""
    if bias is None:
        return None
    wide = accumulation_dtype(d.dtype)
    return jnp.sum(d.astype(wide), axis=tuple(range(d.ndim - 1))).astype(bias.dtype)
