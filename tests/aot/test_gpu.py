"""The kernels for GPUs as the H200's compilers make them: memory, registers, instructions, and access to memory."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_mlp.testing import stacks
from tests.support.gpu_kernels import CASES, END, START, UNEVEN, saves

pytestmark = pytest.mark.needs_compilers
ROOT = Path(__file__).parents[2]
SPILLING = "hidden_gradients", 128, 512, 256, "gelu"  # up to 1 KiB with the erf of newer versions of JAX


@functools.cache
def compiler_output():
    """(exit status, output) of a process that compiles all CASES."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.gpu_kernels"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    return done.returncode, done.stdout


@functools.cache
def compiled_cases():
    """{case: (temp_bytes, bytes of the results that overwrite nothing, HLO, PTX with the report of ptxas)}."""
    status, output = compiler_output()
    assert status == 0, output[-5000:]
    cases = {}
    for case, part in zip(CASES, output.split(START)[1:], strict=True):
        assembly, _, report = part.partition(END)
        cases[case] = *json.loads(report.splitlines()[0]), assembly
    return cases


@pytest.mark.parametrize("save", ["input", "gate_up"])
@pytest.mark.parametrize("options", ["triton", "cublaslt"])
def test_gradient_of_a_scanned_stack_needs_no_more_than_by_xla(options, save):
    config = stacks.make_config("gemma2_2b", save, implementation="pallas")
    by_kernels = stacks.compile_gradient("h200", "scanned", config, options=options).temp_bytes
    by_xla = stacks.gradient_bytes("h200", "scanned", save, "gemma2_2b", options)
    assert by_kernels <= by_xla + 1024  # a few words of bookkeeping


@pytest.mark.parametrize("tokens", [1, 16])
def test_decoding_makes_no_temporary_of_the_size_of_a_weight(tokens):
    config = stacks.make_config("gemma2_27b", implementation="pallas")
    needed = stacks.compile_forward("h200", config, tokens).temp_bytes
    assert needed <= 0.02 * config.embed_dim * config.hidden_dim * 2


@pytest.mark.parametrize("case", [case for case in CASES if case[1] != 8190], ids=str)
def test_needs_no_memory_beyond_its_results(case):
    kernel, T, _, F, _ = case
    temp_bytes, new_bytes, text, _ = compiled_cases()[case]
    assert temp_bytes <= 64  # a table of results
    new = T * F * 2 * (3 if kernel == "hidden" and saves(T) else 1)
    assert new <= new_bytes <= new + 64
    opcodes = set(re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([a-z-]+)\(", text, re.MULTILINE))
    assert opcodes <= {"parameter", "custom-call", "get-tuple-element", "tuple", "bitcast"}
    assert "custom-call" in opcodes


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_uneven_numbers_of_tokens_copy_x_alone(case):
    _, T, D, _, _ = case
    temp_bytes = compiled_cases()[case][0]
    assert temp_bytes <= (T + 8) * D * 2 + 1024


@pytest.mark.parametrize("case", CASES, ids=str)
def test_multiplies_in_warp_groups_and_spills_no_register(case):
    kernel, T, *_ = case
    assembly = compiled_cases()[case][3]
    multiplications = re.findall(r"wgmma\.mma_async\S*", assembly)
    shape = "m64n128k16" if T > 64 else "m64n64k16"  # 4 instructions sum over 64 elements
    expected = [f"wgmma.mma_async.sync.aligned.{shape}.f32.bf16.bf16"] * 4 * (2 if kernel == "hidden" else 1)
    assert multiplications == expected
    after = assembly.rpartition("wgmma.mma_async")[2]
    # The kernel frees its buffers after they have been read, not before.
    assert re.search(r"wgmma\.wait_group\S*\s+0|mbarrier\.arrive", after)[0].startswith("wgmma.wait_group")
    spilled = int(re.search(r"(\d+) bytes spill stores", assembly)[1])
    assert spilled <= 1024 if case == SPILLING else spilled == 0
    assert ".local" not in assembly
    assert "serialized" not in assembly  # ptxas says so if every matmul waits for the one before
    assert "tanh.approx" not in assembly


@pytest.mark.parametrize("case", CASES, ids=str)
def test_global_memory_is_reached_by_coordinates_alone(case):
    """The kernels never compute an offset into a whole array, which would overflow 32 bits in the largest case."""
    assembly = compiled_cases()[case][3]
    accesses = re.findall(r"^\s*(?:@!?%p\d+ )?((?:ld|st|atom|red|cp|ldmatrix|stmatrix)\.\S*)", assembly, re.MULTILINE)
    onto_memory = [access for access in accesses if ".shared" not in access or ".global" in access]
    onto_memory = [access for access in onto_memory if not re.match(r"cp\.async\.bulk\.(commit|wait)_group", access)]
    assert onto_memory
    assert all(re.match(r"cp\.async\.bulk\.tensor\.[2-5]d\.", access) for access in onto_memory)
