"""What the feed-forward needs of a weight W [in, out]: x W, dy W.T, and W's own gradient from x and dy.

Dense, quantised and adapted weights are three ways to give these. Operands are in the compute dtype, sums in float32.

| | dense | quantised | adapted (LoRA) |
|---|---|---|---|
| x W | matmul | x qvalue, then the scales; with groups by slices | base's + factor (x A) B |
| dy W.T | matmul | the scales applied to dy, then dy qvalue.T; with groups by slices | base's + factor (dy B.T) A.T |
| gradient | x.T dy | none, it is frozen | factor x.T (dy B.T) of A, factor (x A).T dy of B, and the base's |
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from gemma_mlp.dtypes import widest
from gemma_mlp.mesh import mesh_to_split, target_device, vary_alike
from gemma_mlp.op import cpu
from gemma_mlp.op.backend import Op
from gemma_mlp.op.slices import LANES, ceil_div, in_slices, round_up
from gemma_mlp.weights import LoRAWeight, QuantizedWeight, dense, scales_per_channel

SLICES = 8  # in which a weight is dequantised, so that only an eighth of it exists in the compute dtype
# XLA's GPU backend merges two matmuls with one x, on copies of both weights, if these have less than 32 MB together
# (XLA's option xla_gpu_dot_merger_threshold_mb).
MERGED_BYTES = 2**24


def project(op: Op, result: Any, x: Array, weight: Any, bias: Array | None) -> Array:
    """x @ weight + bias, in the dtype `result`."""
    if bias is None:
        return matmul(op, result, x, weight)
    y = matmul(op, op.wide, x, weight)
    return (y + jnp.broadcast_to(bias.astype(op.wide), y.shape)).astype(result)


def project_wide(op: Op, stored: Any, x: Array, weight: Any, bias: Array | None) -> Array:
    """x @ weight + bias, in `op.wide`. No array of this shape need be stored in another dtype than `stored`."""
    if isinstance(weight, QuantizedWeight) and scales_per_channel(weight) and bias is None and _rows(x) != 1:
        y = _matmul_quantized(op, stored, x, weight, scaled=False)
        return _times_scale(op, y, weight.scale)
    return project(op, stored, x, weight, bias).astype(op.wide)


def matmul(op: Op, result: Any, a: Array, weight: Any, transpose: bool = False) -> Array:
    """a @ weight, or a @ weight.T, over the last axis of a, in the dtype `result`."""
    if isinstance(weight, LoRAWeight):
        first, second = (weight.lora_b, weight.lora_a) if transpose else (weight.lora_a, weight.lora_b)
        # Stored in `result`. A TPU adds it inside of the base's matmul; a GPU stores the base's part in float32 first.
        delta = matmul(op, result, matmul(op, op.dtype, a, first, transpose), second, transpose).astype(op.wide)
        return (matmul(op, op.wide, a, weight.base, transpose) + weight.factor * delta).astype(result)
    if isinstance(weight, QuantizedWeight):
        return _matmul_quantized(op, result, a, weight, transpose)
    return _matmul_dense(op, result, a, weight, transpose)


def weight_gradient(op: Op, weight: Any, wanted: Any, x: Array, dy: Array) -> Any:
    """The gradient of `weight` for y = x @ weight: a tree like it. None for each array that is not `wanted`.

    Those of adapters are in `op.wide`, because slices of F add up to some of them.
    """
    if isinstance(weight, LoRAWeight):
        a, b, factor = weight.lora_a, weight.lora_b, weight.factor
        base = weight_gradient(op, weight.base, wanted.base, x, dy)
        da = outer(op, x, factor * matmul(op, op.wide, dy, b, transpose=True), op.wide) if wanted.lora_a else None
        db = outer(op, factor * matmul(op, op.wide, x, a), dy, op.wide) if wanted.lora_b else None
        return LoRAWeight(base, da, db, factor)
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight(None, None)
    return outer(op, x, dy, weight.dtype) if wanted else None


def outer(op: Op, a: Array, b: Array, result: Any) -> Array:
    """a.T @ b, summed over all leading axes, in the dtype `result`."""
    # Not with axis_rules: blocks of rows of D would cut across shards.
    if op.on_cpu and op.config.axis_rules is None and op.dtype == jnp.bfloat16 and _rows(a) != 1:
        a, b = (array.reshape(-1, array.shape[-1]).astype(op.dtype) for array in (a, b))
        return cpu.outer_in_blocks(a, b, result, lambda a, b: _dot(op, jnp.float32, a, b, (1,), (0,)))
    tokens = tuple(range(a.ndim - 1))
    # Asked for a result in bfloat16, a CPU may accumulate in bfloat16 too, so it is asked for float32.
    sums = widest(op.wide if op.on_cpu else op.dtype, result)
    return _dot(op, sums, a, b, tokens, tokens).astype(result)


def _matmul_dense(op, result, a, weight, transpose):
    def multiply(a, weight):
        return _dot(op, result, a, _rounded_on_tpu(op, weight), (a.ndim - 1,), (1 if transpose else 0,))

    if op.on_cpu is False or op.dtype != jnp.bfloat16 or _rows(a) != 1:
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


def slices_allowed(op: Op) -> bool:
    """Whether weights may be dequantised slice by slice. Not within a slice, nor where JAX differentiates the loop. A
    mesh may have split the axis of the slices; then it has split the copy of a weight too."""
    return not op.in_slices and op.config.save != "autodiff" and mesh_to_split() is None


def _matmul_quantized(op, result, a, weight, transpose=False, scaled=True):
    """`scaled=False` leaves the scales of the result's channels to the caller."""
    grouped = not scales_per_channel(weight)
    if not grouped and transpose:
        a = _times_scale(op, a, weight.scale)

    def multiply(qvalue, scale):
        """For all of the weight, or for a slice along the result's last axis."""
        if grouped:
            return _matmul_dense(op, result, a, dense(QuantizedWeight(qvalue, scale), op.dtype), transpose)
        if transpose or not scaled:
            return _matmul_dense(op, result, a, qvalue, transpose)
        return _times_scale(op, _matmul_dense(op, op.wide, a, qvalue, transpose), scale).astype(result)

    def whole():
        return multiply(weight.qvalue, weight.scale)

    # On TPUs and GPUs XLA converts a qvalue inside of the matmul. It makes a whole copy on a CPU, on a GPU where it
    # merges two projections of x, and with groups: on a GPU always, on a TPU in a loop over layers.
    if not slices_allowed(op):
        return whole()
    sliced = functools.partial(_in_slices, op, result, a, weight, transpose, multiply)
    if op.on_cpu:
        return sliced(False)
    int4 = weight.qvalue.dtype == jnp.int4
    if not grouped and not (int4 and _rows(a) != 1 and weight.qvalue.size // 2 < MERGED_BYTES):
        return whole()
    # XLA's GPU backend would transpose all of an int4 array of which slices are taken along its last axis.
    in_bytes = int4 and not transpose and weight.shape[1] % 2 == 0
    elsewhere = functools.partial(sliced, False) if grouped else whole
    return lax.platform_dependent(cuda=functools.partial(sliced, in_bytes), default=elsewhere)


def _in_slices(op, result, a, weight, transpose, multiply, in_bytes):
    """`multiply` in slices of the weight along the result's last axis, so that no whole copy of it exists."""
    axis = int(not transpose)
    total, per_channel = weight.shape[axis], scales_per_channel(weight)
    share = 1 if axis or per_channel else weight.group_size  # how much of the axis has one scale
    size = min(total, round_up(ceil_div(total, SLICES), math.lcm(LANES, share)))
    pairs = lax.bitcast_convert_type(weight.qvalue.reshape(weight.shape[0], -1, 2), jnp.int8) if in_bytes else None

    def add_slice(start, size, y):
        if pairs is None:
            qvalue = lax.dynamic_slice_in_dim(weight.qvalue, start, size, axis)
        else:
            qvalue = _int4_slice(pairs, start, size)
        scale = weight.scale
        if axis or not per_channel:
            scale = lax.dynamic_slice_in_dim(scale, start // share, size // share, axis)
        return lax.dynamic_update_slice_in_dim(y, multiply(qvalue, scale), start, a.ndim - 1)

    zeros = jnp.zeros((*a.shape[:-1], total), result)
    return in_slices(total, size, add_slice, vary_alike((zeros, a))[0])


def _times_scale(op, array, scale):
    """`array`, whose last axis is that of the channels, times their scales [1, channels], in float32."""
    return array.astype(op.wide) * jnp.broadcast_to(scale[0].astype(op.wide), array.shape)


def _rows(a):
    """How many rows a matmul has, that is tokens; it may be a symbol."""
    return math.prod(a.shape[:-1])


def _int4_slice(pairs, start, size):
    """Columns of an int4 array, given as bytes of two neighbours each, the first in the low half; as int8."""
    part = lax.dynamic_slice_in_dim(pairs, start // 2, size // 2, 1)
    low = lax.shift_right_arithmetic(lax.shift_left(part, jnp.int8(4)), jnp.int8(4))
    high = lax.shift_right_arithmetic(part, jnp.int8(4))
    return jnp.stack((low, high), -1).reshape(part.shape[0], size)


def _dot(op, result, a, b, a_axes, b_axes):
    dimensions = ((a_axes, b_axes), ((), ()))
    return lax.dot_general(a.astype(op.dtype), b.astype(op.dtype), dimensions, preferred_element_type=result)
