"""h = activation(x W_gate) * (x W_up) in one kernel for NVIDIA's Hopper GPUs (H100, H200), in Pallas's Mosaic GPU.

Both products take bfloat16 operands and stay in float32 registers until the element-wise work is done; h, and gate and
up where they are kept, are rounded once and written once. The weights are read as they are stored, neither stacked nor
transposed, and each block of x is used for both products.

In every block of threads one warp group has the tensor memory accelerator load blocks of x and of both weights while
two multiply the blocks before. A copy to or from global memory takes a 64-bit address and a 32-bit coordinate for each
axis, never an offset into the whole array, so arrays may have more than 2^31 elements. It reads zeros and writes
nothing beyond the last token, so any number of tokens is served.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend
from jaxtyping import Array, BFloat16

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.checks import describe, require

HOPPER = r"\bG?H(100|200|800|20)\b"  # the names of the devices of compute capability 9.0
CONSUMERS = 2  # warp groups that multiply, beside the one that loads
ROWS = 64  # tokens that a warp group multiplies in one instruction
BLOCK_D = 64  # 128 bytes, the widest swizzle of shared memory
BLOCK_F = 128
STAGES = 4  # blocks in flight; with the results' 32 KiB they take 224 of the 227 KiB of shared memory
GROUP = 16  # token blocks between which weights are shared in the L2 cache; 132 blocks at once are about 16 x 8
SUBLANES = 8  # rows of a tile of shared memory
STORE = getattr(plgpu, "store", None)  # newer than JAX 0.10.2; there, assignments read what they overwrite

# As in `ACTIVATIONS`, of what Mosaic GPU has no lowering for: erfc, and custom derivatives on JAX 0.10.2.
LOWERED = {
    **ACTIVATIONS,
    "gelu": lambda x: 0.5 * x * (1 + lax.erf(x * 0.5**0.5)),
    "relu": lambda x: jnp.maximum(x, 0.0),
}


def hidden(
    x: BFloat16[Array, "T D"],
    gate_proj: BFloat16[Array, "D F"],
    up_proj: BFloat16[Array, "D F"],
    *,
    activation: Activation,
    keep: bool,
    interpret=False,
) -> tuple[BFloat16[Array, "T F"], ...]:
    """(h,), or (h, gate, up) to `keep` them: h = activation(gate) * up, gate = x W_gate, up = x W_up.

    Takes no memory beyond its results, but for a copy of x where the number of tokens is above 8 and no multiple of 8.

    Args:
      interpret: what `plgpu.kernel` takes to run on a CPU, False for a GPU.

    Raises:
      ValueError: if the device, a shape or a dtype is not served.
    """
    _check(x, gate_proj, up_proj)
    (T, D), F = x.shape, gate_proj.shape[1]
    # Copies of whole tiles of shared memory want whole tiles in global memory too, but for arrays of a part of one.
    aligned = T % SUBLANES == 0 or T < SUBLANES
    if not aligned:
        x = jnp.pad(x, ((0, -T % SUBLANES), (0, 0)))
    # The warp groups share a block by its tokens, or by its columns where there are no more tokens than for one.
    split_tokens = T > ROWS
    block_T, columns = (CONSUMERS * ROWS, BLOCK_F) if split_tokens else (ROWS, BLOCK_F // CONSUMERS)
    blocks = pl.cdiv(T, block_T), F // BLOCK_F
    tiles = plgpu.TilingTransform((SUBLANES, BLOCK_D)), plgpu.SwizzleTransform(128)

    def kernel(x_ref, gate_ref, up_ref, *result_refs):
        def block(shape, index):
            return plgpu.BlockSpec(shape, index, transforms=tiles)

        def pipeline(step, compute):
            return plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(D // BLOCK_D,),
                in_specs=[
                    block((block_T, BLOCK_D), lambda d: (0, d)),
                    block((BLOCK_D, BLOCK_F), lambda d: (d, 0)),
                    block((BLOCK_D, BLOCK_F), lambda d: (d, 0)),
                ],
                max_concurrent_steps=STAGES,
                wg_axis="warp_group",
                num_compute_wgs=CONSUMERS,
                memory_registers=40,
                compute_context=compute,
            )

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(lambda *_: None, lambda _: None).get_allocations(x_ref, gate_ref, up_ref),
            result_smem=plgpu.SMEM((CONSUMERS, ROWS, columns), x.dtype, transforms=tiles if aligned else ()),
            collective_axes="warp_group",
        )
        def _(buffers, result_smem):
            warp_group = lax.axis_index("warp_group")
            row, column = (warp_group * ROWS, 0) if split_tokens else (0, warp_group * columns)

            @plgpu.nd_loop((blocks[0] * blocks[1],), collective_axes="multiprocessor")
            def _(loop):
                t, f = plgpu.planar_snake(loop.index[0], blocks, 0, GROUP)

                def compute(multiply):
                    accumulator = plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)

                    @functools.partial(pl.run_scoped, gate_acc=accumulator, up_acc=accumulator)
                    def _(gate_acc, up_acc):
                        multiply((gate_acc, up_acc))
                        gate, up = gate_acc[...], up_acc[...]
                        store(LOWERED[activation](gate) * up, result_refs[0])
                        for result, result_ref in zip((gate, up), result_refs[1:]):
                            store(result, result_ref)

                def step(_, x_smem, gate_smem, up_smem, accumulators):
                    for accumulator, weight_smem in zip(accumulators, (gate_smem, up_smem)):
                        plgpu.wgmma(accumulator, x_smem.at[pl.ds(row, ROWS)], weight_smem.at[:, pl.ds(column, columns)])
                    plgpu.wgmma_wait(0)
                    return accumulators

                def store(result, result_ref):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until the last result has left the buffer
                    if STORE is None:
                        result_smem[warp_group] = result.astype(x.dtype)
                    else:
                        STORE(result_smem.at[warp_group], result.astype(x.dtype), optimized=aligned)
                    plgpu.commit_smem()
                    part = pl.ds(t * block_T + row, ROWS), pl.ds(f * BLOCK_F + column, columns)
                    plgpu.copy_smem_to_gmem(result_smem.at[warp_group], result_ref.at[part])

                pipeline(step, compute)(
                    x_ref.at[pl.ds(t * block_T, block_T)],
                    gate_ref.at[:, pl.ds(f * BLOCK_F, BLOCK_F)],
                    up_ref.at[:, pl.ds(f * BLOCK_F, BLOCK_F)],
                    allocations=buffers,
                )

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((T, F), x.dtype),) * (3 if keep else 1),
        grid=(2 if interpret else _multiprocessors(),),
        grid_names=("multiprocessor",),
        num_threads=CONSUMERS + 1,
        thread_name="warp_group",
        # Lane semantics, the default of JAX 0.10.2 alone, know erf and results without tiles.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(x, gate_proj, up_proj)


def _multiprocessors() -> int:
    """How many multiprocessors the device has that JAX traces for, a Hopper GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = backend.get_default_device()
        cores = getattr(device, "core_count", None)
    else:
        cores = device.num_cores
    require(
        re.search(HOPPER, device.device_kind) is not None and cores is not None,
        "The kernel for GPUs runs on those of compute capability 9.0: H100, H200, H800, H20, GH200.",
        repr(device.device_kind),
        "leave the choice of the implementation to gemma_mlp, or, to compile for a GPU that is not there, trace under "
        "jax.set_mesh of its devices.",
    )
    assert cores is not None
    return cores


def _check(x, gate_proj, up_proj) -> None:
    received = f"{describe(x)}, {describe(gate_proj)}, {describe(up_proj)}"
    require(
        x.dtype == gate_proj.dtype == up_proj.dtype == jnp.bfloat16,
        "The kernel for GPUs takes bfloat16.",
        received,
        "compute in bfloat16, or use the implementation 'xla'.",
    )
    require(
        x.ndim == gate_proj.ndim == 2
        and x.shape[0] > 0
        and gate_proj.shape == up_proj.shape == (x.shape[1], gate_proj.shape[-1]),
        "The kernel for GPUs takes x [T, D], T > 0, and both weights [D, F].",
        received,
        "flatten the leading axes of x.",
    )
    D, F = gate_proj.shape
    require(
        D > 0 and F > 0 and D % BLOCK_D == 0 and F % BLOCK_F == 0,
        f"The kernel for GPUs takes multiples of {BLOCK_D} for D and of {BLOCK_F} for F.",
        f"D = {D}, F = {F}",
        "use such sizes, or the implementation 'xla'.",
    )
