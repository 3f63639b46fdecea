"""The block's matrix products: operands in the compute dtype, sums in float32, on the fast path of each backend.

XLA's CPU backend has a fast path for bfloat16 that takes several rows at a time and sums over the last axis of the
first operand. What it would not take is brought into that form here; float32 is as fast in any.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from gemma_mlp.dtypes import accumulation_dtype, widest

LANES = 128  # the width of a TPU's vector registers: slices and blocks of F are multiples of it
# Blocks of an outer product, each rounded before the next one's float32 sums take its place. Value and gradient at 2B
# sizes, 16 to 512 tokens, take 0.79 to 0.84 of the time without blocks; with four or more JAX 0.10.2 loses what 0.12
# wins. One token's product is element-wise work, rounded as it is computed.
BLOCKS = 2


def multiply(a, weight, *, result, dtype, on_cpu=False, transpose=False):
    """a @ weight, or a @ weight.T, over the last axis of a: operands in `dtype`, result in `result`."""
    tokens = a.shape[:-1]
    if on_cpu and dtype == jnp.bfloat16 and math.prod(tokens) == 1:  # one row takes ten times as long as two
        rows = jnp.pad(a.reshape(1, -1), ((0, 1), (0, 0)))
        rows = multiply(rows, weight, result=result, dtype=dtype, transpose=transpose)
        return rows[:1].reshape(*tokens, -1)
    return _dot(a, weight, (a.ndim - 1,), (1 if transpose else 0,), result, dtype)


def outer(a, b, *, result, dtype, on_cpu=False, sharded=False):
    """a.T @ b, summed over all leading axes: operands in `dtype`, result in `result`.

    `sharded`: whether devices have parts of it, which blocks across them would send to and fro.
    """
    if on_cpu and not sharded and dtype == jnp.bfloat16 and math.prod(a.shape[:-1]) > 1:
        return _outer_in_blocks(_flat(a, dtype), _flat(b, dtype), result)
    tokens = tuple(range(a.ndim - 1))
    # A CPU's product whose result is bfloat16 need not have been summed in float32.
    sums = widest(accumulation_dtype(dtype) if on_cpu else dtype, result)
    return _dot(a, b, tokens, tokens, sums, dtype).astype(result)


def _outer_in_blocks(a, b, result):
    # Without the constraint XLA would undo the transposition, as the product can as well sum over the first axis.
    transposed = with_layout_constraint(a.T, Layout(major_to_minor=(0, 1)))

    def multiply_block(start, size, product):
        block = _dot(lax.dynamic_slice_in_dim(transposed, start, size), b, (1,), (0,), jnp.float32, a.dtype)
        return lax.dynamic_update_slice_in_dim(product, block.astype(result), start, 0)

    rows, columns = a.shape[1], b.shape[1]
    return in_slices(rows, ceil_div(rows, BLOCKS), multiply_block, jnp.zeros((rows, columns), result))


def in_slices(total, size, body, carry):
    """carry = body(start, size, carry) for every slice of an axis; the last may be shorter."""
    whole, rest = divmod(total, size)
    carry = lax.fori_loop(0, whole, lambda i, carry: body(i * size, size, carry), carry)
    return body(whole * size, rest, carry) if rest else carry


def ceil_div(a, b):
    return -(-a // b)


def round_up(number, multiple):
    return ceil_div(number, multiple) * multiple


def _flat(a, dtype):
    return a.reshape(-1, a.shape[-1]).astype(dtype)


def _dot(a, b, a_axes, b_axes, result, dtype):
    dimensions = ((a_axes, b_axes), ((), ()))
    return lax.dot_general(a.astype(dtype), b.astype(dtype), dimensions, preferred_element_type=result)
