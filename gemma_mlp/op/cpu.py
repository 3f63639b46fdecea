"""What is fast on XLA's CPU backend: the forms of the block's matmuls, and how many tokens to compute at once.

For bfloat16 that backend has a fast path, which takes several rows at a time and sums over the last axis of the first
operand. Matmuls that would miss it are brought into that form here. float32 is equally fast in any form.
"""

import math

import jax.numpy as jnp
from jax import lax

from gemma_mlp.mesh import mesh_to_split, vary_alike
from gemma_mlp.op.slices import ceil_div, in_slices

# A weight gradient is computed in this many blocks of rows. Each is rounded before the next is summed, so only one
# block is ever in float32. Two are the fastest on JAX 0.10.2 and on 0.12; four were faster on 0.12 only.
BLOCKS = 2
# The allocator returns buffers above 32 MiB to the operating system after each call, and getting them back costs page
# faults. With chunks of this many tokens, gate and up in float32 stay below at 2B and 9B sizes.
CHUNK_TOKENS = 512


def matmul_of_one_row(a, weight, multiply):
    """multiply(a, weight) for an a of one row in bfloat16, padded to two: one row takes ten times as long as two."""
    rows = jnp.pad(a.reshape(1, -1), ((0, 1), (0, 0)))
    return multiply(rows, weight)[:1].reshape(*a.shape[:-1], -1)


def outer_in_blocks(a, b, result, multiply):
    """a.T @ b [D, F] in the dtype `result`, for a [T, D] and b [T, F]."""
    # Without the barrier XLA makes a float32 copy of all of a.T, and may undo the transposition.
    transposed = lax.optimization_barrier(a.T)

    def multiply_block(start, size, outer):
        block = multiply(lax.dynamic_slice_in_dim(transposed, start, size), b)
        return lax.dynamic_update_slice_in_dim(outer, block.astype(result), start, 0)

    rows, columns = a.shape[1], b.shape[1]
    zeros = vary_alike((jnp.zeros((rows, columns), result), a))[0]
    return in_slices(rows, ceil_div(rows, BLOCKS), multiply_block, zeros)


def chunk_size(shape, dtype) -> int | None:
    """How many positions of x [*B, D] a CPU computes at once if the user did not say; None: all of them.

    `vjp._forward` asks if the program is for a CPU, no gradient is wanted and `save` is not `autodiff`. The tokens stay
    whole on a mesh, which may have split them, and where their number is not known (`jax.export`). Only the length is
    cut: a batch of 600 gives 600 tokens or more.
    """
    tokens = math.prod(shape[:-1])
    if not isinstance(tokens, int) or tokens < CHUNK_TOKENS or mesh_to_split() is not None:
        return None
    # 512 tokens of bfloat16 need gate and up in float32 besides h, so that they too are taken in two chunks.
    least = 2 if dtype == jnp.bfloat16 else 1
    chunks = max(least, ceil_div(tokens, CHUNK_TOKENS))
    return None if chunks == 1 else ceil_div(shape[-2], chunks)
