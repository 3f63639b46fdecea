"""The kernels for GPUs as the H200's compilers make it: memory, registers, and how it reaches global stacks.

A process of its own compiles, because the compilers tell of a kernel on the standard error stream, once per process,
and abort where they find no libdevice.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_mlp import aot
from gemma_mlp.testing import stacks

ROOT = Path(__file__).parents[2]
SIZES = {"gemma2_2b": (2304, 9216), "gemma2_9b": (3584, 14336), "gemma2_27b": (4608, 36864)}
KERNELS = ["hidden", "hidden_gradients"]
SERVED = [(kernel, tokens, *SIZES[size]) for kernel in KERNELS for size in SIZES for tokens in (8192, 16, 1)]
LARGE = [(kernel, 65536, *SIZES["gemma2_27b"]) for kernel in KERNELS]  # 2.4e9 elements in each result
UNEVEN = [(kernel, 8190, *SIZES["gemma2_2b"]) for kernel in KERNELS]
OTHERS = ("gelu", "silu", "relu", "sigmoid", "identity")
CASES = [(*case, "gelu_tanh") for case in SERVED + LARGE + UNEVEN]
CASES += [(kernel, 128, 512, 256, activation) for kernel in KERNELS for activation in OTHERS]
SPILLING = "hidden_gradients", 128, 512, 256, "gelu"  # up to 1 KiB, as newer versions of JAX approximate erf
START, END = "=== start", "=== end "


def keeps(tokens):
    """Whether the forward kernel is compiled to keep gate and up: where it is not one of those of SERVED."""
    return tokens not in (8192, 16, 1)


def compile_all():
    import jax

    from gemma_mlp.op import gpu_kernels

    for kernel, T, D, F, activation in CASES:
        print(START, flush=True)
        if kernel == "hidden":
            shapes, options, donated = ((T, D), (D, F), (D, F)), {"save": keeps(T)}, ()
        else:
            shapes, options, donated = ((T, D), (F, D), (T, F), (T, F)), {}, (2, 3)
        results = functools.partial(getattr(gpu_kernels, kernel), activation=activation, **options)

        def h_last(*args):
            """As JAX gives the places of gate and up, donated, to the first results."""
            h, *others = results(*args)
            return *others, h

        args = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes)
        compiled = aot.compile_for("h200", h_last, *args, donate_argnums=donated)
        said = compiled.temp_bytes, compiled.output_bytes - compiled.alias_bytes, compiled.text
        print(END + json.dumps(said), flush=True)


@functools.cache
def compiler_output():
    """(exit status, output) of :func:`compile_all`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.test_pallas_gpu"],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        | {"PYTHONPATH": str(ROOT / "scripts")},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    return done.returncode, done.stdout


@functools.cache
def compiled_cases():
    """(temp_bytes, bytes of new results, HLO, PTX and what ptxas said of it) by case."""
    status, output = compiler_output()
    assert status == 0, output[-5000:]
    cases = {}
    for case, part in zip(CASES, output.split(START)[1:], strict=True):
        assembly, _, said = part.partition(END)
        cases[case] = *json.loads(said.splitlines()[0]), assembly
    return cases


@pytest.mark.parametrize("save", ["input", "gate_up"])
@pytest.mark.parametrize("triton", [True, False])
def test_gradient_of_a_scanned_stack_needs_no_more_than_by_xla(triton, save):
    settings = stacks.config("gemma2_2b", save, implementation="pallas")
    compiled = aot.compile_for(
        "h200",
        stacks.scanned(stacks.apply(settings)),
        stacks.params(settings, stacks.LAYERS),
        stacks.stream(settings),
        compiler_options={"xla_gpu_enable_triton_gemm": triton},
    )
    by_xla = stacks.stack_bytes("h200", "scanned", save, "gemma2_2b", triton)
    assert compiled.temp_bytes <= by_xla + 1024  # a few words of bookkeeping


@pytest.mark.parametrize("tokens", [1, 16])
def test_decoding_makes_no_temporary_of_the_size_of_a_weight(tokens):
    settings = stacks.config("gemma2_27b", implementation="pallas")
    compiled = aot.compile_for("h200", stacks.apply(settings), stacks.params(settings), stacks.stream(settings, tokens))
    assert compiled.temp_bytes <= 0.02 * settings.embed_dim * settings.hidden_dim * 2


@pytest.mark.parametrize("case", [case for case in CASES if case[1] != 8190], ids=str)
def test_needs_no_memory_beyond_its_results(case):
    kernel, T, _, F, _ = case
    temp_bytes, new_bytes, text, _ = compiled_cases()[case]
    assert temp_bytes <= 64  # a table of results
    new = T * F * 2 * (3 if kernel == "hidden" and keeps(T) else 1)
    assert new <= new_bytes <= new + 64
    opcodes = set(re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([a-z-]+)\(", text, re.MULTILINE))
    assert opcodes <= {"parameter", "custom-call", "get-tuple-element", "tuple", "bitcast"}
    assert "custom-call" in opcodes


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_uneven_numbers_of_tokens_copy_x_alone(case):
    _, T, D, _, _ = case = (*case, "gelu_tanh")
    temp_bytes = compiled_cases()[case][0]
    assert temp_bytes <= (T + 8) * D * 2 + 1024


@pytest.mark.parametrize("case", CASES, ids=str)
def test_multiplies_in_warp_groups_and_spills_no_register(case):
    kernel, T, *_ = case
    assembly = compiled_cases()[case][3]
    products = re.findall(r"wgmma\.mma_async\S*", assembly)
    shape = "m64n128k16" if T > 64 else "m64n64k16"  # 64 of the sum are 4 instructions
    assert products == [f"wgmma.mma_async.sync.aligned.{shape}.f32.bf16.bf16"] * 4 * (2 if kernel == "hidden" else 1)
    after = assembly.rpartition("wgmma.mma_async")[2]
    # The buffers are handed back when they have been read, not before.
    assert re.search(r"wgmma\.wait_group\S*\s+0|mbarrier\.arrive", after)[0].startswith("wgmma.wait_group")
    spilled = int(re.search(r"(\d+) bytes spill stores", assembly)[1])
    assert spilled <= 1024 if case == SPILLING else spilled == 0
    assert ".local" not in assembly
    assert "serialized" not in assembly  # as ptxas warns where it makes every product wait for the one before
    assert "tanh.approx" not in assembly


@pytest.mark.parametrize("case", CASES, ids=str)
def test_global_memory_is_reached_by_coordinates_alone(case):
    """So no offset into a whole array is ever computed, which 32 bits would not hold in the largest case."""
    assembly = compiled_cases()[case][3]
    accesses = re.findall(r"^\s*(?:@!?%p\d+ )?((?:ld|st|atom|red|cp|ldmatrix|stmatrix)\.\S*)", assembly, re.MULTILINE)
    onto_memory = [access for access in accesses if ".shared" not in access or ".global" in access]
    onto_memory = [access for access in onto_memory if not re.match(r"cp\.async\.bulk\.(commit|wait)_group", access)]
    assert onto_memory
    assert all(re.match(r"cp\.async\.bulk\.tensor\.[2-5]d\.", access) for access in onto_memory)


if __name__ == "__main__":
    compile_all()
