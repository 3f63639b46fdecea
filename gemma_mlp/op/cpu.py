"""The forms of the block's matmuls that are fast on XLA's CPU backend.

For bfloat16 that backend has a fast path, which takes several rows at a time and sums over the last axis of the first
operand. Matmuls that would miss it are brought into that form here. float32 is equally fast in any form.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from gemma_mlp.op.slices import ceil_div, in_slices

# A weight gradient is computed in this many blocks of rows. Each is rounded before the next is summed, so only one
# block is ever in float32. Two are fastest on both JAX versions; four help 0.12 and hurt 0.10.2.
BLOCKS = 2
# The allocator returns buffers above 32 MiB to the operating system after each call, and getting them back costs page
# faults. Chunks of this many tokens stay below.
CHUNK_TOKENS = 512


def matmul_of_one_row(a, weight, multiply):
    """multiply(a, weight) for an a of one row in bfloat16, padded to two: one row takes ten times as long as two."""
    rows = jnp.pad(a.reshape(1, -1), ((0, 1), (0, 0)))
    return multiply(rows, weight)[:1].reshape(*a.shape[:-1], -1)


def outer_in_blocks(a, b, result, multiply):
    """a.T @ b [D, F] in the dtype `result`, for a [T, D] and b [T, F]."""
    # Without the constraint XLA would undo the transposition, since a matmul can also sum over the first axis.
    transposed = with_layout_constraint(a.T, Layout(major_to_minor=(0, 1)))

    def multiply_block(start, size, outer):
        block = multiply(lax.dynamic_slice_in_dim(transposed, start, size), b)
        return lax.dynamic_update_slice_in_dim(outer, block.astype(result), start, 0)

    rows, columns = a.shape[1], b.shape[1]
    return in_slices(rows, ceil_div(rows, BLOCKS), multiply_block, jnp.zeros((rows, columns), result))


def chunk_size(shape, dtype) -> int | None:
    """How many positions of x [*B, D] to take at a time where no gradient is asked for; None: all of them."""
    tokens = math.prod(shape[:-1])
    if tokens < CHUNK_TOKENS:
        return None
    # In bfloat16 there are three arrays (gate and up in float32, and h), so at least two chunks are needed.
    least = 2 if dtype == jnp.bfloat16 else 1
    return ceil_div(shape[-2], max(least, ceil_div(tokens, CHUNK_TOKENS)))
