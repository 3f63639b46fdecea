"""The feed-forward's forward pass for TPUs in one kernel (Pallas, Mosaic), h nowhere in memory; another for h alone.

Every product takes operands in the compute dtype and is summed in float32; between products everything is float32 in
VMEM, so that gate and up are never rounded. Weights are cast as they arrive, a block at a time.

The grids go through blocks of tokens and, for each, through blocks of F, over which y is summed in VMEM; the rows of x
stay there meanwhile. A last block of tokens that is not full computes on whatever follows in memory: rows do not mix,
and those are not written. Blocks are addressed by the number of their first row and column: no offset in elements is
computed, which 32 bits might not hold.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.checks import require
from gemma_mlp.dtypes import accumulation_dtype
from gemma_mlp.op.cpu import LANES, ceil_div, round_up

ROWS = 16  # bfloat16 lies in tiles of 16 rows: blocks of tokens are multiples of it
# Each weight is read once for a block of tokens: with 1,024 that is 1,024 FLOPs to a byte, of which a v6e needs 560 to
# reach its peak (918 TFLOP/s, 1.64 TB/s: Google Cloud, TPU v6e); 512 would have it wait.
MOST_TOKENS = 1024
MOST_HIDDEN = 512
# Rows of a block that are computed at a time. Their code is unrolled: 1,024 have the compiler take five times as long
# for the same schedule; with 256 the gaps between the loop's turns are 5 % of the time (static bundles, v6e, 27B).
UNROLLED = 512
MANY_TOKENS = 256  # above, products take longer than weights take to arrive
VMEM_SHARE = 15 / 16  # of the chip's; the rest is the compiler's


def feed_forward(
    x: Float[Array, "T D"],
    gate_proj: Float[Array, "D F"],
    up_proj: Float[Array, "D F"],
    down_proj: Float[Array, "F D"],
    *,
    activation: Activation,
    keep: bool,
) -> tuple[Array, ...]:
    """y = (activation(x W_gate) * (x W_up)) W_down [T, D] and, to `keep`, gate and up [T, F], in the dtype of x.

    It needs no memory but its results'.
    """
    (tokens, embed_dim), dtype, weight_dtype = x.shape, x.dtype, gate_proj.dtype
    hidden_dim = gate_proj.shape[1]
    wide = accumulation_dtype(dtype)

    def vmem_bytes(blocks):
        row = embed_dim * (2 * 2 * dtype.itemsize + wide.itemsize)  # twice: in use, and on its way
        column = 3 * embed_dim * (2 * weight_dtype.itemsize + dtype.itemsize * (weight_dtype != dtype))
        kept = 2 * 2 * dtype.itemsize * blocks.tokens * keep
        return row * blocks.tokens + (column + kept + 6 * blocks.rows * wide.itemsize) * blocks.hidden

    require_sizes(embed_dim, hidden_dim)
    blocks = choose_blocks(_candidates(tokens, hidden_dim), vmem_bytes)
    stream = pl.BlockSpec((blocks.tokens, embed_dim), lambda i, j: (i, 0))
    gate_up = pl.BlockSpec((embed_dim, blocks.hidden), lambda i, j: (0, j))
    kept = pl.BlockSpec((blocks.tokens, blocks.hidden), lambda i, j: (i, j))
    return pl.pallas_call(
        functools.partial(_kernel, activation, blocks.rows),
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, dtype),
            *[jax.ShapeDtypeStruct((tokens, hidden_dim), dtype)] * (2 if keep else 0),
        ),
        grid=(ceil_div(tokens, blocks.tokens), hidden_dim // blocks.hidden),
        in_specs=[stream, gate_up, gate_up, pl.BlockSpec((blocks.hidden, embed_dim), lambda i, j: (j, 0))],
        out_specs=(stream, *[kept] * (2 if keep else 0)),
        scratch_shapes=[pltpu.VMEM((blocks.tokens, embed_dim), wide)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
        name="geglu",
    )(x, gate_proj, up_proj, down_proj)


def _kernel(activation, rows, x, gate_proj, up_proj, down_proj, y, *rest):
    *kept, sum_TD = rest

    @pl.when(pl.program_id(1) == 0)
    def _():
        fill_zeros(sum_TD)

    def compute(at):
        gate_up = multiply(x[at], gate_proj), multiply(x[at], up_proj)
        for result, array in zip(kept, gate_up):
            result[at] = array.astype(result.dtype)
        h = gated(activation, *gate_up)
        sum_TD[at] += multiply(h.astype(x.dtype), down_proj)

    in_rows(rows, x.shape[0], compute)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        store(y, sum_TD)


def hidden(
    x: Float[Array, "T D"], gate_proj: Float[Array, "D F"], up_proj: Float[Array, "D F"], *, activation: Activation
) -> Float[Array, "T F"]:
    """h = activation(x W_gate) * (x W_up), in the dtype of x. It needs no memory but its result's."""
    (tokens, embed_dim), dtype, weight_dtype = x.shape, x.dtype, gate_proj.dtype
    hidden_dim = gate_proj.shape[1]

    def vmem_bytes(blocks):
        row = 2 * dtype.itemsize * (embed_dim + blocks.hidden)
        column = 2 * embed_dim * (2 * weight_dtype.itemsize + dtype.itemsize * (weight_dtype != dtype))
        return row * blocks.tokens + (column + 4 * blocks.rows * accumulation_dtype(dtype).itemsize) * blocks.hidden

    require_sizes(embed_dim, hidden_dim)
    blocks = choose_blocks(_candidates(tokens, hidden_dim), vmem_bytes)
    weight = pl.BlockSpec((embed_dim, blocks.hidden), lambda i, j: (0, j))
    return pl.pallas_call(
        functools.partial(_hidden_kernel, activation, blocks.rows),
        out_shape=jax.ShapeDtypeStruct((tokens, hidden_dim), dtype),
        grid=(ceil_div(tokens, blocks.tokens), hidden_dim // blocks.hidden),
        in_specs=[pl.BlockSpec((blocks.tokens, embed_dim), lambda i, j: (i, 0)), weight, weight],
        out_specs=pl.BlockSpec((blocks.tokens, blocks.hidden), lambda i, j: (i, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
        name="geglu_hidden",
    )(x, gate_proj, up_proj)


def _hidden_kernel(activation, rows, x, gate_proj, up_proj, h):
    def compute(at):
        h[at] = gated(activation, multiply(x[at], gate_proj), multiply(x[at], up_proj)).astype(h.dtype)

    in_rows(rows, x.shape[0], compute)


class Blocks(NamedTuple):
    """How many tokens and how much of F a step of the grid takes, and how many of its tokens at a time."""

    tokens: int
    hidden: int
    rows: int


def require_sizes(embed_dim: int, hidden_dim: int) -> None:
    require(
        embed_dim % LANES == hidden_dim % LANES == 0,
        f"The kernels for TPUs take an embed_dim and, on each device, a hidden_dim that are multiples of {LANES}.",
        f"{embed_dim} and {hidden_dim}",
        "use such sizes, or implementation='xla'.",
    )


def parts_of_hidden(hidden_dim: int) -> list[int]:
    """The sizes of a block of F, from large to small."""
    return [size for size in range(MOST_HIDDEN, 0, -LANES) if hidden_dim % size == 0]


def choose_blocks(candidates: list[Blocks], vmem_bytes: Callable[[Blocks], int]) -> Blocks:
    """The first of some blocks that the chip's VMEM holds.

    Raises:
      ValueError: if none does.
    """
    fitting = [blocks for blocks in candidates if vmem_bytes(blocks) <= vmem_limit()]
    require(
        bool(fitting),
        f"A kernel's smallest blocks fit into VMEM, {vmem_limit()} bytes.",
        f"an embed_dim for which they take {min(map(vmem_bytes, candidates))}",
        "use implementation='xla'.",
    )
    return fitting[0]


def vmem_limit() -> int:
    return int(VMEM_SHARE * pltpu.get_tpu_info().vmem_capacity_bytes)


def _candidates(tokens, hidden_dim):
    """From large to small; of tokens first, as these decide how often a weight is read."""
    blocks, most = [], MOST_TOKENS
    while most >= ROWS:
        count = ceil_div(tokens, most)
        if tokens >= MANY_TOKENS:
            count = round_up(count, pltpu.get_tpu_info().num_cores)
        share = ceil_div(tokens, count)
        turns = ceil_div(share, UNROLLED)
        rows = round_up(ceil_div(share, turns), ROWS)
        blocks += [Blocks(turns * rows, size, rows) for size in parts_of_hidden(hidden_dim)]
        most //= 2
    return blocks


def multiply(a, weight, transpose=False):
    """a @ weight, or a @ weight.T, of a block: operands in the dtype of a, summed in float32."""
    return dot(a, weight[...].astype(a.dtype), (1,), (1 if transpose else 0,))


def dot(a, b, a_axes, b_axes):
    # Products of bfloat16 are exact in any case; Mosaic refuses to be asked for more than their own precision.
    precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    dimensions = ((a_axes, b_axes), ((), ()))
    wide = accumulation_dtype(a.dtype)
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=wide)


def gated(activation, gate, up):
    return ACTIVATIONS[activation](gate) * up


def in_rows(size, total, body):
    """body(rows) for every `size` rows of a block, in a loop that is not unrolled."""

    def turn(i, carry):
        body(pl.ds(pl.multiple_of(i * size, ROWS), size))
        return carry

    lax.fori_loop(0, total // size, turn, None)


def fill_zeros(array):
    def fill(at):
        array[at] = jnp.zeros((ROWS, array.shape[1]), array.dtype)

    in_rows(ROWS, array.shape[0], fill)


def store(result, total):
    """`total`, rounded to the dtype of `result`."""

    def store_rows(at):
        result[at] = total[at].astype(result.dtype)

    in_rows(ROWS, total.shape[0], store_rows)
