"""Pallas kernels for NVIDIA's Hopper GPUs (H100, H200; Mosaic GPU): h with gate and up, and their gradients.

Forward: h = activation(x W_gate) * (x W_up). Backward, from saved gate and up: h and the gradients of both. Matmuls
take bfloat16 operands and stay in float32 registers until the element-wise work is done; each result is rounded once
and written once. The weights are read as they are stored, neither stacked nor transposed, and each block of x serves
both matmuls.

In every block of threads, one warp group has the tensor memory accelerator load blocks of x and of the weights, while
two others multiply the blocks before. A copy to or from global memory takes a 64-bit address and a 32-bit coordinate
for each axis, never an offset into the whole array, so arrays may have more than 2^31 elements. Beyond the last token a
copy reads zeros and writes nothing, so any number of tokens is served.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from gemma_mlp.activations import ACTIVATIONS, Activation, GateActivation, erf_gelu, normal_cdf_by_erf
from gemma_mlp.checks import describe, require
from gemma_mlp.mesh import target_device

HOPPER = r"\bG?H(100|200|800|20)\b"  # the names of the devices of compute capability 9.0
CONSUMERS = 2  # warp groups that multiply, in addition to the one that loads
ROWS = 64  # tokens that a warp group multiplies in one instruction
BLOCK_D = 64  # 128 bytes, the widest swizzle of shared memory
BLOCK_F = 128
STAGES = 4  # blocks in flight; with 32 KiB of results and 64 KiB of gate and up, 224 of 227 KiB of shared memory
GROUP = 16  # token blocks that share weights in the L2 cache; 132 blocks at once are about 16 x 8
SUBLANES = 8  # rows of a tile of shared memory
STORE = getattr(plgpu, "store", None)  # newer than JAX 0.10.2; there, assignments read what they overwrite
LOAD: Any = plgpu.load if STORE else functools.partial(plgpu.load, idx=())  # JAX 0.10.2 takes the index apart

# Mosaic GPU cannot lower erfc, nor, on JAX 0.10.2, the custom derivative of jax.nn.relu.
LOWERED = ACTIVATIONS | {
    "gelu": erf_gelu(normal_cdf_by_erf),
    "relu": GateActivation(lambda x: jnp.maximum(x, 0.0), ACTIVATIONS["relu"].derivative),
}


def hidden(
    x: BFloat16[Array, "T D"],
    gate_proj: BFloat16[Array, "D F"],
    up_proj: BFloat16[Array, "D F"],
    *,
    activation: Activation,
    save_gate_up: bool,
) -> tuple[BFloat16[Array, "T F"], ...]:
    """(h,), or (h, gate, up) if gate and up are saved: h = activation(gate) * up, gate = x W_gate, up = x W_up.

    It needs no memory beyond its results, except for a copy of x if there are more than 8 tokens and their number is
    not a multiple of 8. A device, a shape or a dtype that is not served raises a ValueError.
    """

    def elementwise(gate, up):
        yield LOWERED[activation].gated(gate, up)
        if save_gate_up:
            yield from (gate, up)

    return _multiply(elementwise, x, (gate_proj, up_proj), num_new=3 if save_gate_up else 1)


def hidden_gradients(
    dy: BFloat16[Array, "T D"],
    down_proj: BFloat16[Array, "F D"],
    gate: BFloat16[Array, "T F"],
    up: BFloat16[Array, "T F"],
    *,
    activation: Activation,
) -> tuple[BFloat16[Array, "T F"], ...]:
    """h and the gradients of gate and up, for the gradient dy of y; dh = dy W_down^T is only ever in registers.

    The gradients overwrite gate and up. If these are needed later, XLA copies them first. Other arguments and errors
    are those of :func:`hidden`.
    """

    def elementwise(dh, gate, up):
        yield LOWERED[activation].gated(gate(), up())
        yield dh * up() * LOWERED[activation].derivative(gate())  # one at a time: registers are scarce
        yield dh * LOWERED[activation](gate())

    return _multiply(elementwise, dy, (down_proj,), in_place=(gate, up), num_new=1, transposed=True)


def _multiply(elementwise, x, weights, *, in_place=(), num_new, transposed=False):
    """elementwise(*matmuls, *in_place), rounded to bfloat16: `num_new` new arrays, then the in-place ones, [T, F] each.

    x [T, D] is multiplied by each of the weights: [D, F], or [F, D] if transposed. `elementwise` is a generator: it is
    given the matmuls' results as float32 blocks and, for each in-place array, a function that loads its block, and it
    yields the results in order.
    """
    _check(x, weights, in_place, transposed)
    (T, D), F = x.shape, weights[0].shape[0 if transposed else 1]
    # A tiled copy needs a whole number of tiles in global memory as well, unless the array is smaller than one tile.
    aligned = T % SUBLANES == 0 or T < SUBLANES
    if not aligned:
        x = jnp.pad(x, ((0, -T % SUBLANES), (0, 0)))
    # The warp groups share a block by its tokens, or by its columns if one group has room for all tokens.
    split_tokens = T > ROWS
    block_T, columns = (CONSUMERS * ROWS, BLOCK_F) if split_tokens else (ROWS, BLOCK_F // CONSUMERS)
    blocks = pl.cdiv(T, block_T), F // BLOCK_F
    tiles = plgpu.TilingTransform((SUBLANES, BLOCK_D)), plgpu.SwizzleTransform(128)
    block = functools.partial(plgpu.BlockSpec, transforms=tiles)

    def kernel(x_ref, *refs):
        ends = len(weights), len(weights) + len(in_place)
        weight_refs, in_place_refs, new_refs = refs[: ends[0]], refs[ends[0] : ends[1]], refs[ends[1] :]

        def pipeline(step, compute):
            if transposed:
                weight_block = block((BLOCK_F, BLOCK_D), lambda d: (0, d))
            else:
                weight_block = block((BLOCK_D, BLOCK_F), lambda d: (d, 0))
            return plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(D // BLOCK_D,),
                in_specs=[block((block_T, BLOCK_D), lambda d: (0, d)), *[weight_block] * len(weights)],
                max_concurrent_steps=STAGES,
                wg_axis="warp_group",
                num_compute_wgs=CONSUMERS,
                memory_registers=40,
                compute_context=compute,
            )

        # One buffer for each warp group, for its tile of the arrays [T, F].
        part_smem = plgpu.SMEM((CONSUMERS, ROWS, columns), x.dtype, transforms=tiles if aligned else ())

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(lambda *_: None, lambda _: None).get_allocations(x_ref, *weight_refs),
            result_smem=part_smem,
            loaded_smem=[part_smem] * len(in_place),
            loaded=plgpu.Barrier(num_arrivals=max(1, len(in_place)), num_barriers=CONSUMERS),
            collective_axes="warp_group",
        )
        def _(buffers, result_smem, loaded_smem, loaded):
            warp_group = lax.axis_index("warp_group")
            row, column = (warp_group * ROWS, 0) if split_tokens else (0, warp_group * columns)

            @plgpu.nd_loop((blocks[0] * blocks[1],), collective_axes="multiprocessor")
            def _(loop):
                t, f = plgpu.planar_snake(loop.index[0], blocks, 0, GROUP)
                part = pl.ds(t * block_T + row, ROWS), pl.ds(f * BLOCK_F + column, columns)
                of_hidden = pl.ds(f * BLOCK_F, BLOCK_F)

                def compute(multiply):
                    for ref, smem in zip(in_place_refs, loaded_smem):
                        plgpu.copy_gmem_to_smem(ref.at[part], smem.at[warp_group], loaded.at[warp_group])

                    def finish(*accumulators):
                        multiply(accumulators)
                        if in_place:
                            plgpu.barrier_wait(loaded.at[warp_group])
                        matmuls = [accumulator[...] for accumulator in accumulators]
                        loads = [functools.partial(load, smem) for smem in loaded_smem]
                        for result, ref in zip(elementwise(*matmuls, *loads), (*new_refs, *in_place_refs), strict=True):
                            store(result, ref)

                    accumulator = plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)
                    pl.run_scoped(finish, *[accumulator] * len(weights))

                def step(_, x_smem, *rest):
                    *weights_smem, accumulators = rest
                    for accumulator, weight_smem in zip(accumulators, weights_smem):
                        if transposed:
                            weight_part = weight_smem.at[pl.ds(column, columns)].transpose((1, 0))
                        else:
                            weight_part = weight_smem.at[:, pl.ds(column, columns)]
                        plgpu.wgmma(accumulator, x_smem.at[pl.ds(row, ROWS)], weight_part)
                    plgpu.wgmma_wait(0)
                    return accumulators

                def load(smem):
                    own = smem.at[warp_group]
                    a = own[...] if aligned else LOAD(own, layout=plgpu.Layout.WGMMA, optimized=False)
                    return a.astype(jnp.float32)

                def store(result, result_ref):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until the last result has left the buffer
                    if STORE is None:
                        result_smem[warp_group] = result.astype(x.dtype)
                    else:
                        STORE(result_smem.at[warp_group], result.astype(x.dtype), optimized=aligned)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(result_smem.at[warp_group], result_ref.at[part])

                pipeline(step, compute)(
                    x_ref.at[pl.ds(t * block_T, block_T)],
                    *[ref.at[of_hidden] if transposed else ref.at[:, of_hidden] for ref in weight_refs],
                    allocations=buffers,
                )

            plgpu.wait_smem_to_gmem(0)

    run: Any = pl.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((T, F), x.dtype)] * num_new,
        mesh=plgpu.Mesh(
            grid=(count_multiprocessors(),),
            grid_names=("multiprocessor",),
            num_threads=CONSUMERS + 1,
            thread_name="warp_group",
        ),
        # Lane semantics support erf and untiled results; they are the default only in JAX 0.10.2.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )

    @jax.custom_batching.sequential_vmap
    def call(x, weights, in_place):
        def update(refs):
            new = run(x, *weights, *refs[num_new:])
            for ref, result in zip(refs, new):
                ref[...] = result

        return tuple(pl.run_state(update)([*[lax.empty((T, F), x.dtype)] * num_new, *in_place]))

    return call(x, weights, in_place)


def count_multiprocessors() -> int:
    """How many multiprocessors the Hopper GPU has that the program is compiled for."""
    device = target_device()
    cores = device.num_cores if isinstance(device, jax.sharding.AbstractDevice) else getattr(device, "core_count", None)
    require(
        re.search(HOPPER, device.device_kind) is not None and cores is not None,
        "For the GPU kernels the device must have compute capability 9.0: H100, H200, H800, H20, GH200.",
        repr(device.device_kind),
        "use implementation='xla'; to compile for a GPU that is not there, trace under jax.set_mesh of its devices.",
    )
    assert cores is not None
    return cores


def _check(x, weights, in_place, transposed) -> None:
    received = ", ".join(map(describe, (x, *weights, *in_place)))
    require(
        all(a.dtype == jnp.bfloat16 for a in (x, *weights, *in_place)),
        "For the GPU kernels all arrays must be bfloat16.",
        received,
        "compute in bfloat16, or use implementation='xla'.",
    )
    shape = weights[0].shape[::-1] if transposed else weights[0].shape
    require(
        x.ndim == len(shape) == 2
        and x.shape[0] > 0
        and x.shape[1] == shape[0]
        and all(weight.shape == weights[0].shape for weight in weights)
        and all(a.shape == (x.shape[0], shape[1]) for a in in_place),
        "For the GPU kernels x or dy must be [T, D] with T > 0, gate_proj and up_proj [D, F] or down_proj [F, D], and "
        "gate and up [T, F].",
        received,
        "flatten the leading axes of x.",
    )
    D, F = shape
    require(
        D > 0 and F > 0 and D % BLOCK_D == 0 and F % BLOCK_F == 0,
        f"For the GPU kernels D must be a multiple of {BLOCK_D} and F a multiple of {BLOCK_F}.",
        f"D = {D}, F = {F}",
        "use such sizes, or implementation='xla'.",
    )
