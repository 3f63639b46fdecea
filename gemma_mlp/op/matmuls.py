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
from gemma_mlp.mesh import mesh_to_split, vary_alike
from gemma_mlp.op import cpu
from gemma_mlp.op.backend import Op
from gemma_mlp.op.slices import LANES, ceil_div, in_slices, round_up
from gemma_mlp.weights import LoRAWeight, QuantizedWeight, dense, scales_per_channel

SLICES = 8  # in which a weight is dequantised, so that only an eighth of it exists in the compute dtype


def project(op: Op, result: Any, x: Array, weight: Any, bias: Array | None) -> Array:
    """x @ weight + bias, in the dtype `result`."""
    if bias is None:
        return matmul(op, result, x, weight)
    y = matmul(op, op.wide, x, weight)
    return (y + jnp.broadcast_to(bias.astype(op.wide), y.shape)).astype(result)


def matmul(op: Op, result: Any, a: Array, weight: Any, transpose: bool = False) -> Array:
    """a @ weight, or a @ weight.T, over the last axis of a, in the dtype `result`."""
    if isinstance(weight, LoRAWeight):
        first, second = (weight.lora_b, weight.lora_a) if transpose else (weight.lora_a, weight.lora_b)
        delta = matmul(op, op.wide, matmul(op, op.dtype, a, first, transpose), second, transpose)
        return (matmul(op, op.wide, a, weight.base, transpose) + weight.factor * delta).astype(result)
    if isinstance(weight, QuantizedWeight):
        return _matmul_quantized(op, result, a, weight, transpose)
    return _matmul_dense(op, result, a, weight, transpose)


def weight_gradient(op: Op, weight: Any, wanted: Any, x: Array, dy: Array) -> Any:
    """The gradient of `weight` for y = x @ weight: a tree like it. None for each array that is not `wanted`."""
    if isinstance(weight, LoRAWeight):
        a, b, factor = weight.lora_a, weight.lora_b, weight.factor
        base = weight_gradient(op, weight.base, wanted.base, x, dy)
        da = outer(op, x, factor * matmul(op, op.wide, dy, b, transpose=True), a.dtype) if wanted.lora_a else None
        db = outer(op, factor * matmul(op, op.wide, x, a), dy, b.dtype) if wanted.lora_b else None
        return LoRAWeight(base, da, db, factor)
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight(None, None)
    return outer(op, x, dy, weight.dtype) if wanted else None


def outer(op: Op, a: Array, b: Array, result: Any) -> Array:
    """a.T @ b, summed over all leading axes, in the dtype `result`."""
    # Not with axis_rules: blocks of rows of D would cut across shards.
    if op.on_cpu and op.config.axis_rules is None and op.dtype == jnp.bfloat16 and math.prod(a.shape[:-1]) != 1:
        a, b = (array.reshape(-1, array.shape[-1]).astype(op.dtype) for array in (a, b))
        return cpu.outer_in_blocks(a, b, result, lambda a, b: _dot(op, jnp.float32, a, b, (1,), (0,)))
    tokens = tuple(range(a.ndim - 1))
    # Asked for a result in bfloat16, a CPU may accumulate in bfloat16 too, so it is asked for float32.
    sums = widest(op.wide if op.on_cpu else op.dtype, result)
    return _dot(op, sums, a, b, tokens, tokens).astype(result)


def _matmul_dense(op, result, a, weight, transpose):
    def multiply(a, weight):
        return _dot(op, result, a, weight, (a.ndim - 1,), (1 if transpose else 0,))

    if op.on_cpu is False or op.dtype != jnp.bfloat16 or math.prod(a.shape[:-1]) != 1:
        return multiply(a, weight)

    def padded(a, weight):
        return cpu.matmul_of_one_row(a, weight, multiply)

    return padded(a, weight) if op.on_cpu else lax.platform_dependent(a, weight, cpu=padded, default=multiply)


def _matmul_quantized(op, result, a, weight, transpose):
    grouped = not scales_per_channel(weight)
    if not grouped and transpose:
        a = a.astype(op.wide) * weight.scale[0].astype(op.wide)
    scaled_after = not grouped and not transpose

    def multiply(qvalue, scale):
        """For all of the weight, or for a slice along the result's last axis."""
        part = dense(QuantizedWeight(qvalue, scale), op.dtype) if grouped else qvalue
        y = _matmul_dense(op, op.wide if scaled_after else result, a, part, transpose)
        return (y * scale[0].astype(op.wide)).astype(result) if scaled_after else y

    # On a TPU, and on a GPU without groups, XLA converts a weight inside of the matmul. Elsewhere it would make a whole
    # copy. A mesh may have split the axis of the slices; it has split the copy as well.
    output = int(not transpose)  # the weight's axis that becomes the result's last
    multiple = LANES if output else math.lcm(LANES, weight.group_size)
    size = round_up(ceil_div(weight.shape[output], SLICES), multiple)
    unsliced = op.config.save == "autodiff" or mesh_to_split() is not None or not (grouped or op.on_cpu)
    if unsliced or size >= weight.shape[output]:
        return multiply(weight.qvalue, weight.scale)

    def in_slices_of(take_qvalue):
        def add_slice(start, size, y):
            scale = weight.scale
            if output:
                scale = lax.dynamic_slice_in_dim(scale, start, size, 1)
            elif grouped:
                scale = lax.dynamic_slice_in_dim(scale, start // weight.group_size, size // weight.group_size)
            return lax.dynamic_update_slice_in_dim(y, multiply(take_qvalue(start, size), scale), start, a.ndim - 1)

        zeros = jnp.zeros((*a.shape[:-1], weight.shape[output]), result)
        return in_slices(weight.shape[output], size, add_slice, vary_alike((zeros, a))[0])

    def as_it_is():
        return in_slices_of(lambda start, size: lax.dynamic_slice_in_dim(weight.qvalue, start, size, output))

    if not output or op.on_cpu or weight.qvalue.dtype != jnp.int4 or weight.shape[1] % 2:
        return as_it_is()
    # XLA's GPU backend would transpose all of an int4 array of which slices are taken along its last axis.
    pairs = lax.bitcast_convert_type(weight.qvalue.reshape(weight.shape[0], -1, 2), jnp.int8)
    in_bytes = functools.partial(in_slices_of, functools.partial(_int4_slice, pairs))
    return lax.platform_dependent(cuda=in_bytes, default=as_it_is)


def _int4_slice(pairs, start, size):
    """Columns of an int4 array, given as bytes of two neighbours each, the first in the low half; as int8."""
    part = lax.dynamic_slice_in_dim(pairs, start // 2, size // 2, 1)
    low = lax.shift_right_arithmetic(lax.shift_left(part, jnp.int8(4)), jnp.int8(4))
    high = lax.shift_right_arithmetic(part, jnp.int8(4))
    return jnp.stack((low, high), -1).reshape(part.shape[0], size)


def _dot(op, result, a, b, a_axes, b_axes):
    dimensions = ((a_axes, b_axes), ((), ()))
    return lax.dot_general(a.astype(op.dtype), b.astype(op.dtype), dimensions, preferred_element_type=result)
