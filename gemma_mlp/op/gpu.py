"""The feed-forward's [T, F] arrays in one kernel for each pass, for NVIDIA's Hopper GPUs (H100, H200; Mosaic GPU).

Forward: h = activation(x W_gate) * (x W_up). Backward, from gate and up: h and the gradients of both. The products take
bfloat16 operands and stay in float32 registers until the element-wise work is done; each result is rounded once and
written once. The weights are read as they are stored, neither stacked nor transposed, and each block of x is used for
both products.

In every block of threads one warp group has the tensor memory accelerator load blocks of x and of the weights while two
multiply the blocks before. A copy to or from global memory takes a 64-bit address and a 32-bit coordinate for each
axis, never an offset into the whole array, so arrays may have more than 2^31 elements. It reads zeros and writes
nothing beyond the last token, so any number of tokens is served.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.checks import describe, require
from gemma_mlp.op.device import target_device

HOPPER = r"\bG?H(100|200|800|20)\b"  # the names of the devices of compute capability 9.0
CONSUMERS = 2  # warp groups that multiply, beside the one that loads
ROWS = 64  # tokens that a warp group multiplies in one instruction
BLOCK_D = 64  # 128 bytes, the widest swizzle of shared memory
BLOCK_F = 128
STAGES = 4  # blocks in flight; with the results' 32 KiB, and 64 KiB of gate and up, 224 of 227 KiB of shared memory
GROUP = 16  # token blocks between which weights are shared in the L2 cache; 132 blocks at once are about 16 x 8
SUBLANES = 8  # rows of a tile of shared memory
STORE = getattr(plgpu, "store", None)  # newer than JAX 0.10.2; there, assignments read what they overwrite
LOAD: Any = plgpu.load if STORE else functools.partial(plgpu.load, idx=())  # JAX 0.10.2 takes the index apart

# As in `ACTIVATIONS`, of what Mosaic GPU has no lowering for: erfc, and custom derivatives on JAX 0.10.2.
LOWERED = {
    **ACTIVATIONS,
    "gelu": lambda x: 0.5 * x * (1 + lax.erf(x * 0.5**0.5)),
    "relu": lambda x: jnp.maximum(x, 0.0),
}


def _gelu_tanh_derivative(x):
    c, k = math.sqrt(2 / math.pi), 0.044715
    tanh = jnp.tanh(c * (x + k * x * x * x))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * c * (1 + 3 * k * x * x)


# Nor has it one for the sums that JAX's own differentiation makes.
DERIVATIVES = {
    "gelu_tanh": _gelu_tanh_derivative,
    "gelu": lambda x: 0.5 * (1 + lax.erf(x * 0.5**0.5)) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    "silu": lambda x: jax.nn.sigmoid(x) * (1 + x * (1 - jax.nn.sigmoid(x))),
    "relu": lambda x: jnp.where(x > 0, 1.0, 0.0),
    "sigmoid": lambda x: jax.nn.sigmoid(x) * (1 - jax.nn.sigmoid(x)),
    "identity": jnp.ones_like,
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

    def elementwise(gate, up):
        yield LOWERED[activation](gate) * up
        if keep:
            yield from (gate, up)

    weights = gate_proj, up_proj
    return _multiply(elementwise, x, weights, num_new=3 if keep else 1, interpret=interpret)


def hidden_gradients(
    dy: BFloat16[Array, "T D"],
    down_proj: BFloat16[Array, "F D"],
    gate: BFloat16[Array, "T F"],
    up: BFloat16[Array, "T F"],
    *,
    activation: Activation,
    interpret=False,
) -> tuple[BFloat16[Array, "T F"], ...]:
    """h and the gradients of gate and up, for the gradient dy of y; dh = dy W_down^T is in registers alone.

    The gradients take the place of gate and up, which XLA copies before where they are used again. Arguments and errors
    are otherwise as in :func:`hidden`.
    """

    def elementwise(dh, gate, up):
        yield LOWERED[activation](gate()) * up()
        yield dh * up() * DERIVATIVES[activation](gate())
        yield dh * LOWERED[activation](gate())

    in_place = gate, up
    return _multiply(elementwise, dy, (down_proj,), in_place=in_place, num_new=1, transposed=True, interpret=interpret)


def _multiply(elementwise, x, weights, *, in_place=(), num_new, transposed=False, interpret):
    """The results of elementwise(*products, *in_place), rounded to bfloat16: `num_new` new ones, the others in place.

    Args:
      elementwise: of float32 blocks, what there is in place as functions that load one; it yields the results in turn.
      x: [T, D], multiplied by each of the weights: [D, F], or [F, D] if transposed.
      in_place: [T, F] each.
    """
    _check(x, weights, in_place, transposed)
    (T, D), F = x.shape, weights[0].shape[0 if transposed else 1]
    # Copies of whole tiles of shared memory want whole tiles in global memory too, but for arrays of a part of one.
    aligned = T % SUBLANES == 0 or T < SUBLANES
    if not aligned:
        x = jnp.pad(x, ((0, -T % SUBLANES), (0, 0)))
    # The warp groups share a block by its tokens, or by its columns where there are no more tokens than for one.
    split_tokens = T > ROWS
    block_T, columns = (CONSUMERS * ROWS, BLOCK_F) if split_tokens else (ROWS, BLOCK_F // CONSUMERS)
    blocks = pl.cdiv(T, block_T), F // BLOCK_F
    tiles = plgpu.TilingTransform((SUBLANES, BLOCK_D)), plgpu.SwizzleTransform(128)

    def kernel(x_ref, *refs):
        ends = len(weights), len(weights) + len(in_place)
        weight_refs, in_place_refs, new_refs = refs[: ends[0]], refs[ends[0] : ends[1]], refs[ends[1] :]

        def block(shape, index):
            return plgpu.BlockSpec(shape, index, transforms=tiles)

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

        # Of each warp group, for its part of arrays [T, F].
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
                        products = [accumulator[...] for accumulator in accumulators]
                        loads = [functools.partial(load, smem) for smem in loaded_smem]
                        for result, ref in zip(
                            elementwise(*products, *loads), (*new_refs, *in_place_refs), strict=True
                        ):
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
            grid=(2 if interpret else _multiprocessors(),),
            grid_names=("multiprocessor",),
            num_threads=CONSUMERS + 1,
            thread_name="warp_group",
        ),
        # Lane semantics, the default of JAX 0.10.2 alone, know erf and results without tiles.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )

    @jax.custom_batching.sequential_vmap
    def call(x, weights, in_place):
        def update(refs):
            new = run(x, *weights, *refs[num_new:])
            for ref, result in zip(refs, new):
                ref[...] = result

        return tuple(pl.run_state(update)([*[lax.empty((T, F), x.dtype)] * num_new, *in_place]))

    return call(x, weights, in_place)


def _multiprocessors() -> int:
    """How many multiprocessors the device has that JAX traces for, a Hopper GPU."""
    device = target_device()
    cores = device.num_cores if isinstance(device, jax.sharding.AbstractDevice) else getattr(device, "core_count", None)
    require(
        re.search(HOPPER, device.device_kind) is not None and cores is not None,
        "The kernel for GPUs runs on those of compute capability 9.0: H100, H200, H800, H20, GH200.",
        repr(device.device_kind),
        "leave the choice of the implementation to gemma_mlp, or, to compile for a GPU that is not there, trace under "
        "jax.set_mesh of its devices.",
    )
    assert cores is not None
    return cores


def _check(x, weights, in_place, transposed) -> None:
    received = ", ".join(map(describe, (x, *weights, *in_place)))
    require(
        all(a.dtype == jnp.bfloat16 for a in (x, *weights, *in_place)),
        "The kernels for GPUs take bfloat16.",
        received,
        "compute in bfloat16, or use the implementation 'xla'.",
    )
    shape = weights[0].shape[::-1] if transposed else weights[0].shape
    require(
        x.ndim == len(shape) == 2
        and x.shape[0] > 0
        and x.shape[1] == shape[0]
        and all(weight.shape == weights[0].shape for weight in weights)
        and all(a.shape == (x.shape[0], shape[1]) for a in in_place),
        "The kernels for GPUs take x or dy [T, D], T > 0, gate_proj and up_proj [D, F] or down_proj [F, D], and gate "
        "and up [T, F].",
        received,
        "flatten the leading axes of x.",
    )
    D, F = shape
    require(
        D > 0 and F > 0 and D % BLOCK_D == 0 and F % BLOCK_F == 0,
        f"The kernels for GPUs take multiples of {BLOCK_D} for D and of {BLOCK_F} for F.",
        f"D = {D}, F = {F}",
        "use such sizes, or the implementation 'xla'.",
    )
