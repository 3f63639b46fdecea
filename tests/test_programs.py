"""The block inside other people's programs: right against the plain formula, or refused with the way out.

Every program runs with each `save`, with and without `chunk_size`, with no token, one and several, in each dtype.
"""

import pathlib
import re

import jax
import numpy as np
import pytest

from gemma_mlp import MLPConfig
from gemma_mlp.testing.oracle import relative_error
from tests.support.programs import PROGRAMS, exported, on_meshes, transformed
from tests.support.programs.formulas import D, F, Ours, Plain, make_params

pytestmark = [pytest.mark.usefixtures("quick_to_compile"), pytest.mark.promotes]  # which plain code and Flax rely on

README = pathlib.Path(__file__).parent.parent / "gemma_mlp" / "op" / "README.md"
LENGTHS = {"several": 5, "one": 1, "none": 0}
# The largest errors measured are 0.027 (three layers, second derivatives) and 2e-6. A sum that JAX forgot, or added
# twice, is an error of a third or more.
BOUNDS = {"bfloat16": 0.05, None: 1e-5}
ON_DEVICES = {*on_meshes.PROGRAMS, "nnx.shard_map"}  # several of them
# These run by default, with several tokens.
QUICK = [
    "grad in jit",
    "jvp",
    "scan over layers",
    "shard_map over data",
    "shard_map over data, the rest automatic, with rules",
    "shard_map over tensor",
    "pmap",
    "a mesh of explicit axes, with rules",
    "export, any batch",
    "export, any length",
    "nnx.value_and_grad in nnx.jit",
    "nn.scan over layers, with remat",
]


def rows():
    """Every program with each `save`, with and without chunks, and with each number of tokens; but not all at once."""
    for i, name in enumerate(PROGRAMS):
        for j, save in enumerate(("input", "gate_up", "autodiff"), start=i):
            tokens = list(LENGTHS)[j % 3]
            row = name, save, (2, None)[j % 2], tokens, list(BOUNDS)[(i // 2 + j) % 2]
            marks = [] if name in QUICK and tokens == "several" else [pytest.mark.slow]
            marks += [pytest.mark.eight_devices] if name in ON_DEVICES else []
            yield pytest.param(*row, marks=marks)


def refusal(program, save, chunk_size, tokens):
    """The type and the words of the error, if the program is refused."""
    if program in transformed.FORWARD_MODE and save != "autodiff":
        return TypeError, "can't apply forward-mode"
    if program in exported.ANY_LENGTH and chunk_size is not None:
        return ValueError, "chunk_size needs to know the length"
    if program in exported.ANY_LENGTH and tokens == "none":
        return ValueError, "Expected value >= 1"  # by JAX, when the exported program is called
    return None


@pytest.mark.parametrize(("program", "save", "chunk_size", "tokens", "dtype"), list(rows()))
def test_the_block_in_a_program(program, save, chunk_size, tokens, dtype):
    x = jax.random.normal(jax.random.key(9), (2, LENGTHS[tokens], D))
    params, run = make_params(), PROGRAMS[program]
    ours = Ours(MLPConfig(D, F, save=save, chunk_size=chunk_size, dtype=dtype))
    refused = refusal(program, save, chunk_size, tokens)
    if refused is not None:
        with pytest.raises(refused[0], match=re.escape(refused[1])):
            run(ours, params, x)
        return
    results, expected = jax.tree.leaves(run(ours, params, x)), jax.tree.leaves(run(Plain(), params, x))
    assert len(results) == len(expected) > 0
    for got, want in zip(results, expected):
        assert got.shape == want.shape
        if want.size:
            assert relative_error(got, np.asarray(want, np.float64)) < BOUNDS[dtype]


def test_the_readme_names_every_program():
    section = README.read_text().split("## Inside other people's programs")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!---|kind)[^|]+\| ([^|]+) \|$", section, re.MULTILINE)
    assert [name for row in rows for name in row.split("; ")] == list(PROGRAMS)
    assert set(QUICK) <= set(PROGRAMS)
