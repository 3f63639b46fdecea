"""The forward pass for TPUs in one Pallas kernel, in which h is nowhere in memory; and a kernel for h alone.

Every matmul takes operands in the compute dtype and accumulates in float32. Gate and up stay float32 in VMEM until h is
computed. Weights are cast block by block as they arrive.

The grid goes through blocks of tokens. For each it goes through blocks of F, over which y is summed in VMEM while the
rows of x stay there. If the last block of tokens is not full, it computes on whatever follows in memory: rows do not
mix, and the surplus rows are not written. Blocks are addressed by block number, so offsets cannot overflow 32 bits.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.dtypes import accumulation_dtype
from gemma_mlp.op import tpu_blocks
from gemma_mlp.op.slices import ceil_div, round_up

# Each weight is read once for a block of tokens. With 1,024 tokens that is 1,024 FLOPs to a byte, of which a v6e needs
# 560 to reach its peak (918 TFLOP/s, 1.64 TB/s: Google Cloud, TPU v6e); with 512 it would wait for memory.
MOST_TOKENS = 1024
# Rows computed per loop iteration. The body is unrolled: 1,024 rows take five times as long to compile for the same
# schedule; at 256 rows, loop overhead is 5 % of the time (static bundles, v6e, 27B).
UNROLLED = 512
MANY_TOKENS = 256  # above this, matmuls take longer than weights take to arrive


def fused_forward(
    x: Float[Array, "T D"],
    gate_proj: Float[Array, "D F"],
    up_proj: Float[Array, "D F"],
    down_proj: Float[Array, "F D"],
    *,
    activation: Activation,
    save_gate_up: bool,
) -> tuple[Array, ...]:
    """(y,), or (y, gate, up) if these are saved, in the dtype of x: y = (activation(x W_gate) * (x W_up)) W_down.

    It needs no memory except for its results.
    """
    kernel, num_hidden = functools.partial(_kernel, activation), 2 if save_gate_up else 0
    return _call(kernel, x, gate_proj, up_proj, down_proj, num_hidden=num_hidden, name="geglu")


def hidden_only(
    x: Float[Array, "T D"], gate_proj: Float[Array, "D F"], up_proj: Float[Array, "D F"], *, activation: Activation
) -> tuple[Float[Array, "T F"]]:
    """(h,) in the dtype of x: h = activation(x W_gate) * (x W_up). It needs no memory except for its result."""
    kernel = functools.partial(_hidden_kernel, activation)
    return _call(kernel, x, gate_proj, up_proj, num_hidden=1, name="geglu_hidden")


def _call(kernel, x, *weights, num_hidden, name):
    """Runs `kernel` on blocks. Its results are y, if down_proj is among the weights, and `num_hidden` arrays [T, F]."""
    (tokens, embed_dim), dtype, weight_dtype = x.shape, x.dtype, weights[0].dtype
    hidden_dim = weights[0].shape[1]
    wide = accumulation_dtype(dtype)
    num_y = len(weights) - 2  # y and its sum

    def vmem_bytes(blocks):
        # There are two buffers for each array: one in use, one on its way.
        row = embed_dim * (2 * dtype.itemsize + num_y * (2 * dtype.itemsize + wide.itemsize))
        row += 2 * dtype.itemsize * num_hidden * blocks.hidden
        column = len(weights) * embed_dim * (2 * weight_dtype.itemsize + dtype.itemsize * (weight_dtype != dtype))
        return row * blocks.tokens + (column + 2 * len(weights) * blocks.rows * wide.itemsize) * blocks.hidden

    blocks = tpu_blocks.choose_blocks(embed_dim, hidden_dim, _candidates(tokens, hidden_dim), vmem_bytes)
    stream = pl.BlockSpec((blocks.tokens, embed_dim), lambda i, j: (i, 0))
    gate_up = pl.BlockSpec((embed_dim, blocks.hidden), lambda i, j: (0, j))
    down = pl.BlockSpec((blocks.hidden, embed_dim), lambda i, j: (j, 0))
    hidden = pl.BlockSpec((blocks.tokens, blocks.hidden), lambda i, j: (i, j))
    shapes = [x.shape] * num_y + [(tokens, hidden_dim)] * num_hidden
    return pl.pallas_call(
        functools.partial(kernel, blocks.rows),
        out_shape=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes),
        grid=(ceil_div(tokens, blocks.tokens), hidden_dim // blocks.hidden),
        in_specs=[stream, *(gate_up, gate_up, down)[: len(weights)]],
        out_specs=(*[stream] * num_y, *[hidden] * num_hidden),
        scratch_shapes=[pltpu.VMEM((blocks.tokens, embed_dim), wide)] * num_y,
        compiler_params=tpu_blocks.compiler_params("parallel", "arbitrary"),
        name=name,
    )(x, *weights)


def _kernel(activation, rows, x, gate_proj, up_proj, down_proj, y, *rest):
    *saved, sum_TD = rest

    @pl.when(pl.program_id(1) == 0)
    def _():
        tpu_blocks.fill_zeros(sum_TD)

    def compute(at):
        gate_up = tpu_blocks.matmul(x[at], gate_proj), tpu_blocks.matmul(x[at], up_proj)
        for result, array in zip(saved, gate_up):
            result[at] = array.astype(result.dtype)
        h = ACTIVATIONS[activation].gated(*gate_up)
        sum_TD[at] += tpu_blocks.matmul(h.astype(x.dtype), down_proj)

    tpu_blocks.in_rows(rows, x.shape[0], compute)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        tpu_blocks.store(y, sum_TD)


def _hidden_kernel(activation, rows, x, gate_proj, up_proj, h):
    def compute(at):
        gate, up = tpu_blocks.matmul(x[at], gate_proj), tpu_blocks.matmul(x[at], up_proj)
        h[at] = ACTIVATIONS[activation].gated(gate, up).astype(h.dtype)

    tpu_blocks.in_rows(rows, x.shape[0], compute)


def _candidates(tokens, hidden_dim):
    """Largest first. Smaller blocks of F come before fewer tokens: each block of tokens reads all weights again."""
    blocks, most = [], MOST_TOKENS
    while most >= tpu_blocks.ROWS:
        count = ceil_div(tokens, most)
        if tokens >= MANY_TOKENS:
            count = round_up(count, pltpu.get_tpu_info().num_cores)
        share = ceil_div(tokens, count)
        turns = ceil_div(share, UNROLLED)
        rows = round_up(ceil_div(share, turns), tpu_blocks.ROWS)
        blocks += [tpu_blocks.Blocks(turns * rows, size, rows) for size in tpu_blocks.hidden_block_sizes(hidden_dim)]
        most //= 2
    return blocks
