"""What the kernels for TPUs share: the sizes of blocks, matmuls and loops over the rows of a block.

Each kernel lists its candidates for block sizes, largest first (`_candidates` in tpu_forward.py and tpu_backward.py),
and says how many bytes of VMEM they take (its `vmem_bytes`). `choose_blocks` takes the first that fits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_mlp.checks import require
from gemma_mlp.dtypes import accumulation_dtype
from gemma_mlp.op.slices import LANES

ROWS = 16  # bfloat16 lies in tiles of 16 rows: blocks of tokens are multiples of it
MOST_HIDDEN = 512
VMEM_SHARE = 15 / 16  # of the chip's VMEM; the rest is the compiler's


class Blocks(NamedTuple):
    """What one step of the grid takes: tokens, a block of F, and how many rows of the tokens it computes at a time."""

    tokens: int
    hidden: int
    rows: int


def hidden_block_sizes(hidden_dim: int) -> list[int]:
    """The sizes of a block of F, from large to small."""
    return [size for size in range(MOST_HIDDEN, 0, -LANES) if hidden_dim % size == 0]


def choose_blocks(
    embed_dim: int, hidden_dim: int, candidates: list[Blocks], vmem_bytes: Callable[[Blocks], int]
) -> Blocks:
    """The first of the candidates that fits into the chip's VMEM.

    It raises a ValueError if none does, or for sizes that the kernels do not serve.
    """
    require(
        embed_dim % LANES == hidden_dim % LANES == 0,
        f"For the TPU kernels embed_dim and, on each device, hidden_dim must be multiples of {LANES}.",
        f"{embed_dim} and {hidden_dim}",
        "use such sizes, or implementation='xla'.",
    )
    fitting = [blocks for blocks in candidates if vmem_bytes(blocks) <= vmem_limit()]
    require(
        bool(fitting),
        f"A kernel's smallest blocks must fit into VMEM, which has {vmem_limit()} bytes.",
        f"an embed_dim for which they take {min(map(vmem_bytes, candidates))} bytes",
        "use implementation='xla'.",
    )
    return fitting[0]


def vmem_limit() -> int:
    return int(VMEM_SHARE * pltpu.get_tpu_info().vmem_capacity_bytes)


def compiler_params(*dimension_semantics):
    return pltpu.CompilerParams(dimension_semantics=dimension_semantics, vmem_limit_bytes=vmem_limit())


def matmul(a, weight, transpose=False):
    """a @ weight, or a @ weight.T, for a block of each: operands in the dtype of a, accumulated in float32."""
    return dot(a, weight[...].astype(a.dtype), (1,), (1 if transpose else 0,))


def dot(a, b, a_axes, b_axes):
    # bfloat16 times bfloat16 is exact in float32; Mosaic refuses any other precision for it.
    precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    dimensions = ((a_axes, b_axes), ((), ()))
    wide = accumulation_dtype(a.dtype)
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=wide)


def in_rows(size, total, body):
    """Calls body(rows) for every `size` rows of a block, in a loop that is not unrolled."""

    def turn(i, carry):
        body(pl.ds(pl.multiple_of(i * size, ROWS), size))
        return carry

    lax.fori_loop(0, total // size, turn, None)


def fill_zeros(array):
    def fill(at):
        array[at] = jnp.zeros((ROWS, array.shape[1]), array.dtype)

    in_rows(ROWS, array.shape[0], fill)


def store(result, total):
    """Writes `total` to `result`, rounded to its dtype."""

    def store_rows(at):
        result[at] = total[at].astype(result.dtype)

    in_rows(ROWS, total.shape[0], store_rows)
