"""The backward pass for TPUs in one Pallas kernel; and a kernel that starts from saved gate and up.

The grids go through blocks of F. For each block they go through all tokens. Matmuls accumulate in float32 and their
results stay so in VMEM, as do the sums over tokens that are the weights' gradients. Each result is rounded once and
written once.

Where nothing is saved, no [T, F] array is in memory: gate, up and dh of a block are recomputed in VMEM. All blocks of F
add to the gradient of x, which is in memory in float32: each step fetches its rows, adds to them and sends them back.
If a chip has two cores (v4, v5p) and F is a multiple of 256, each core takes half of the blocks, and both add to the
same dx. Core 1 starts half-way through the tokens. A semaphore makes a core wait while the other has the rows it needs.

Where gate and up are saved, the kernel computes their gradients and that of W_down, without an h or dh in memory; XLA
multiplies these with x and with the weights.

Each gradient overwrites its own input (a weight, gate or up), whose block has been read by then. In a scan over layers
the inputs are copies anyway, so the gradients need no extra memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.dtypes import accumulation_dtype
from gemma_mlp.op import tpu_blocks
from gemma_mlp.op.slices import LANES, ceil_div, round_up

# Tokens of a step. For each block of F, x, dy and dx pass by: 12 bytes for each element of [T, D], for 16 FLOPs times
# the block's width, whatever the number of tokens in a step. With blocks of 512 that is 683 FLOPs to a byte; a v6e
# needs 560.
MOST_TOKENS = 256
CORES = "core_parallel"  # along an axis of this kind program_id is the number of the core


def fused_backward(
    x: Float[Array, "T D"],
    dy: Float[Array, "T D"],
    gate_proj: Float[Array, "D F"],
    up_proj: Float[Array, "D F"],
    down_proj: Float[Array, "F D"],
    *,
    activation: Activation,
) -> tuple[Float[Array, "T D"], Float[Array, "D F"], Float[Array, "D F"], Float[Array, "F D"]]:
    """The gradients of x, in float32, and of the weights, in their dtypes, for the gradient dy of y."""
    (tokens, embed_dim), dtype, weight_dtype = x.shape, x.dtype, gate_proj.dtype
    hidden_dim = gate_proj.shape[1]
    wide = accumulation_dtype(dtype)

    def vmem_bytes(blocks):
        row = embed_dim * (2 * 2 * dtype.itemsize + 2 * wide.itemsize)
        column = 3 * embed_dim * (4 * weight_dtype.itemsize + wide.itemsize)
        cast = 3 * embed_dim * dtype.itemsize * (weight_dtype != dtype)
        inner = 8 * blocks.hidden * wide.itemsize + embed_dim * wide.itemsize
        return (row + inner) * blocks.tokens + (column + cast) * blocks.hidden

    cores = math.gcd(hidden_dim // LANES, pltpu.get_tpu_info().num_cores)
    candidates = _candidates(ceil_div(tokens, cores), hidden_dim // cores)
    blocks = tpu_blocks.choose_blocks(embed_dim, hidden_dim, candidates, vmem_bytes)
    hidden_blocks = hidden_dim // cores // blocks.hidden
    turns = ceil_div(tokens, blocks.tokens)

    stream = pl.BlockSpec((blocks.tokens, embed_dim), lambda core, j, i: (_place(core, i, turns, cores), 0))
    gate_up = pl.BlockSpec((embed_dim, blocks.hidden), lambda core, j, i: (0, core * hidden_blocks + j))
    down = pl.BlockSpec((blocks.hidden, embed_dim), lambda core, j, i: (core * hidden_blocks + j, 0))
    weights = [gate_up, gate_up, down]
    # dx has a leading axis of size 1. Without it a v6e may carry dx in VMEM through a loop over layers and copy it to
    # HBM. The kernel needs it in HBM, because each core has a VMEM of its own.
    dx_shape = 1, turns * blocks.tokens, embed_dim
    kernel = pl.pallas_call(
        functools.partial(_kernel, activation, tokens, turns, cores),
        out_shape=[
            jax.ShapeDtypeStruct(dx_shape, wide),
            *[jax.ShapeDtypeStruct(weight.shape, weight_dtype) for weight in (gate_proj, up_proj, down_proj)],
        ],
        grid=(cores, hidden_blocks, turns),
        in_specs=[stream, stream, *weights],
        out_specs=[pl.BlockSpec(memory_space=pltpu.HBM), *weights],
        input_output_aliases={2: 1, 3: 2, 4: 3},
        scratch_shapes=[
            *[pltpu.VMEM((embed_dim, blocks.hidden), wide)] * 2,
            pltpu.VMEM((blocks.hidden, embed_dim), wide),
            pltpu.VMEM((2, blocks.tokens, embed_dim), wide),
            *[pltpu.SemaphoreType.DMA((2,))] * 2,
            pltpu.SemaphoreType.REGULAR,
        ],
        compiler_params=tpu_blocks.compiler_params(CORES if cores > 1 else "arbitrary", "arbitrary", "arbitrary"),
        name="geglu_gradients",
    )
    # Pallas cannot batch an array that a kernel leaves in memory. Under vmap the kernel runs in a loop instead.
    dx, *dweights = sequential_vmap(kernel)(x, dy, gate_proj, up_proj, down_proj)
    return dx[0, :tokens], *dweights


def backward_from_saved(
    dy: Float[Array, "T D"],
    gate: Float[Array, "T F"],
    up: Float[Array, "T F"],
    down_proj: Float[Array, "F D"],
    *,
    activation: Activation,
) -> tuple[Float[Array, "T F"], Float[Array, "T F"], Float[Array, "F D"]]:
    """The gradients of gate, of up and of W_down, in their dtypes, for the gradient dy of y."""
    (tokens, embed_dim), dtype, weight_dtype = dy.shape, dy.dtype, down_proj.dtype
    hidden_dim = down_proj.shape[0]
    wide = accumulation_dtype(dtype)

    def vmem_bytes(blocks):
        row = (embed_dim + 4 * blocks.hidden) * 2 * dtype.itemsize + 8 * blocks.hidden * wide.itemsize
        column = embed_dim * (4 * weight_dtype.itemsize + wide.itemsize)
        cast = embed_dim * dtype.itemsize * (weight_dtype != dtype)
        return row * blocks.tokens + (column + cast) * blocks.hidden

    blocks = tpu_blocks.choose_blocks(embed_dim, hidden_dim, _candidates(tokens, hidden_dim), vmem_bytes)
    part = pl.BlockSpec((blocks.tokens, blocks.hidden), lambda j, i: (i, j))
    weight = pl.BlockSpec((blocks.hidden, embed_dim), lambda j, i: (j, 0))
    given = gate, up, down_proj
    return pl.pallas_call(
        functools.partial(_kernel_from_saved, activation, tokens),
        out_shape=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in given),
        grid=(hidden_dim // blocks.hidden, ceil_div(tokens, blocks.tokens)),
        in_specs=[pl.BlockSpec((blocks.tokens, embed_dim), lambda j, i: (i, 0)), part, part, weight],
        out_specs=(part, part, weight),
        input_output_aliases={1: 0, 2: 1, 3: 2},
        scratch_shapes=[pltpu.VMEM((blocks.hidden, embed_dim), wide)],
        compiler_params=tpu_blocks.compiler_params("parallel", "arbitrary"),
        name="geglu_gradients_from_saved",
    )(dy, *given)


def _candidates(tokens, hidden_dim):
    """Largest first, and of equal ones the largest block of F first: each block of F reads x, dy and dx again."""
    all_tokens = round_up(tokens, tpu_blocks.ROWS)
    halves = (MOST_TOKENS >> i for i in range(MOST_TOKENS.bit_length()))
    sizes = {min(half, all_tokens) for half in halves if half >= tpu_blocks.ROWS}
    parts = tpu_blocks.hidden_block_sizes(hidden_dim)
    blocks = [tpu_blocks.Blocks(size, part, size) for part in parts for size in sizes]
    return sorted(blocks, key=lambda b: (b.tokens * b.hidden, b.hidden), reverse=True)


def _place(core, i, turns, cores):
    """The block of tokens that a core takes in its turn i. Core 1 starts where core 0 is half-way through."""
    return lax.rem(i + core * ceil_div(turns, cores), turns)


def _kernel(activation, tokens, turns, cores, x, dy, gate_proj, up_proj, down_proj, dx, *rest):
    *dweights, sum_gate, sum_up, sum_down, dx_rows, arrivals, departures, handed_over = rest
    sums = sum_gate, sum_up, sum_down
    size = x.shape[0]
    core, j, i = (pl.program_id(axis) for axis in range(3))
    step, steps = j * turns + i, pl.num_programs(1) * turns
    slot = lax.rem(step, 2)
    place = _place(core, i, turns, cores)
    in_memory = dx.at[0, pl.ds(pl.multiple_of(place * size, tpu_blocks.ROWS), size)]
    fetch = pltpu.make_async_copy(in_memory, dx_rows.at[slot], arrivals.at[slot])

    # The other core had the same block of tokens `distance` steps earlier. (A core that is alone had it itself.)
    half = ceil_div(turns, cores)
    distance = half + core * (turns - 2 * half)
    is_first = step < distance

    def send(slot):
        return pltpu.make_async_copy(dx_rows.at[slot], in_memory, departures.at[slot])

    def finish(earlier):
        """Waits until the rows of an earlier step are in memory. Then tells the other core, if it will fetch them."""
        send(lax.rem(earlier, 2)).wait()
        if cores > 1:
            is_wanted = earlier + turns - distance < steps
            pl.when(is_wanted)(lambda: pl.semaphore_signal(handed_over, core_index=1 - core))

    # Rows must be in memory before their buffer is used again, two steps later, and before they are fetched again. That
    # is turns // cores steps later; cores that told each other later than that would wait for each other for ever.
    lag = max(1, min(2, turns // cores))
    pl.when(step >= lag)(lambda: finish(step - lag))

    @pl.when(is_first)
    def _():
        tpu_blocks.fill_zeros(dx_rows.at[slot])

    @pl.when(~is_first)
    def _():
        if cores > 1:
            pl.semaphore_wait(handed_over)
        fetch.start()

    @pl.when(i == 0)
    def _():
        for total in sums:
            tpu_blocks.fill_zeros(total)

    x_TD, dy_TD = _existing(x[...], place, tokens), _existing(dy[...], place, tokens)
    gate, up = tpu_blocks.matmul(x_TD, gate_proj), tpu_blocks.matmul(x_TD, up_proj)
    dh = tpu_blocks.matmul(dy_TD, down_proj, transpose=True)
    gradients = ACTIVATIONS[activation].gated_gradients(gate, up, dh)
    h, dgate, dup = (a.astype(x.dtype) for a in (ACTIVATIONS[activation].gated(gate, up), *gradients))
    sum_gate[...] += _outer(x_TD, dgate)
    sum_up[...] += _outer(x_TD, dup)
    sum_down[...] += _outer(h, dy_TD)
    part = tpu_blocks.matmul(dgate, gate_proj, transpose=True) + tpu_blocks.matmul(dup, up_proj, transpose=True)
    pl.when(~is_first)(fetch.wait)
    dx_rows[slot] += part
    send(slot).start()

    @pl.when(i == turns - 1)
    def _():
        for dweight, total in zip(dweights, sums):
            tpu_blocks.store(dweight, total)

    @pl.when(step == steps - 1)
    def _():
        for earlier in range(lag):
            finish(step - earlier)


def _kernel_from_saved(activation, tokens, dy, gate, up, down_proj, dgate, dup, ddown_proj, sum_FD):
    i = pl.program_id(1)

    @pl.when(i == 0)
    def _():
        tpu_blocks.fill_zeros(sum_FD)

    dy_TD, gate_TF, up_TF = (_existing(a[...], i, tokens) for a in (dy, gate, up))
    gate_TF, up_TF = gate_TF.astype(sum_FD.dtype), up_TF.astype(sum_FD.dtype)
    dh_TF = tpu_blocks.matmul(dy_TD, down_proj, transpose=True)
    sum_FD[...] += _outer(ACTIVATIONS[activation].gated(gate_TF, up_TF).astype(dy.dtype), dy_TD)
    for result, array in zip((dgate, dup), ACTIVATIONS[activation].gated_gradients(gate_TF, up_TF, dh_TF)):
        result[...] = array.astype(result.dtype)

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        tpu_blocks.store(ddown_proj, sum_FD)


def _existing(a, i, tokens):
    """Block i with zeros in the rows beyond the last token, so that they add nothing to sums over tokens."""
    size = a.shape[0]
    if tokens % size == 0:
        return a
    exists = i * size + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < tokens
    return jnp.where(exists, a, 0)


def _outer(a, b):
    """a.T @ b, accumulated over tokens in float32."""
    return tpu_blocks.dot(a, b, (0,), (0,))
