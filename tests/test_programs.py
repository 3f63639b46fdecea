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
from tests.support.programs import PROGRAMS, exported, transformed
from tests.support.programs.formulas import D, F, Ours, Plain, make_params
from tests.support.vary import vary

pytestmark = pytest.mark.promotes  # the plain formula and Flax rely on it

README = pathlib.Path(__file__).parent.parent / "gemma_mlp" / "op" / "README.md"
LENGTHS = {"several": 5, "one": 1, "none": 0}
# The largest errors measured are 0.027 (three layers, second derivatives) and 2e-6. A sum that JAX forgot, or added
# twice, is an error of a third or more.
BOUNDS = {"bfloat16": 0.05, None: 1e-5}
OPTIONS = [  # save, chunk_size, tokens, dtype: nearly every pair
    ("input", 2, "several", "bfloat16"),
    ("input", None, "one", "bfloat16"),
    ("input", 2, "none", None),
    ("gate_up", 2, "several", None),
    ("gate_up", None, "one", None),
    ("gate_up", None, "none", "bfloat16"),
    ("autodiff", 2, "one", "bfloat16"),
    ("autodiff", None, "several", None),
]
# By default a program runs with its first options, and these differ from one program to the next.
ROWS = [(name, *OPTIONS[(i + j) % len(OPTIONS)]) for i, name in enumerate(PROGRAMS) for j in range(len(OPTIONS))]


def refusal(program, save, chunk_size, tokens):
    """The type and the words of the error, if the program is refused."""
    if program in transformed.FORWARD_MODE and save != "autodiff":
        return TypeError, "can't apply forward-mode"
    if program in exported.ANY_LENGTH and chunk_size is not None:
        return ValueError, "chunk_size needs to know the length"
    if program in exported.ANY_LENGTH and tokens == "none":
        return ValueError, "Expected value >= 1"  # by JAX, when the exported program is called
    return None


@vary("program save chunk_size tokens dtype", ROWS)
def test_the_block_in_a_program(program, save, chunk_size, tokens, dtype, eight_devices):
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
