"""Slices and chunks cover an axis once, whatever the sizes: first the arithmetic alone, then the op that uses it."""

import functools

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gemma_mlp.op import cpu, slices
from tests.support.cases import FLOAT32_BOUND, SAVES, case, errors, exact_result, run

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def python_loop(first, last, body, carry):
    return functools.reduce(lambda carry, i: body(i, carry), range(first, last), carry)


def numpy_slice(array, start, size, axis):
    return np.take(array, range(start, start + size), axis)


def numpy_put(array, part, start, axis):
    array = np.moveaxis(array.copy(), axis, 0)
    array[start : start + part.shape[axis]] = np.moveaxis(part, axis, 0)
    return np.moveaxis(array, 0, axis)


@pytest.fixture(scope="class")
def in_numpy():
    """The loop in Python and the slices in NumPy, where a slice outside of the array is an error. Nothing compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices.lax, "fori_loop", python_loop)
        patch.setattr(slices.lax, "dynamic_slice_in_dim", numpy_slice)
        patch.setattr(slices.lax, "dynamic_update_slice_in_dim", numpy_put)
        yield


@pytest.mark.usefixtures("in_numpy")
class TestArithmetic:
    @given(st.integers(0, 300), st.integers(1, 320))
    def test_every_position_is_in_one_slice(self, total, size):
        taken = slices.in_slices(total, size, lambda start, size, taken: [*taken, range(start, start + size)], [])
        assert [position for part in taken for position in part] == list(range(total))
        assert all(len(part) == size for part in taken[:-1]) and all(0 < len(part) <= size for part in taken)

    @given(
        st.lists(st.integers(1, 3), max_size=3),
        st.lists(st.integers(1, 3), max_size=3),
        st.integers(1, 4),
        st.integers(1, 12),
        st.integers(1, 14),
        st.booleans(),
    )
    def test_every_row_of_a_sharded_axis_is_taken_and_put_once(self, before, after, shards, shard, size, from_the_end):
        axis = len(before) - (len(before) + 1 + len(after) if from_the_end else 0)
        sliced = slices.SlicedAxis(axis, shards)
        x = np.random.default_rng(0).standard_normal((*before, shards * shard, *after))

        def body(start, size, carry):
            y, count = carry
            part = sliced.take(x, start, size)
            by_hand = np.concatenate([numpy_slice(x, i * shard + start, size, axis) for i in range(shards)], axis)
            np.testing.assert_array_equal(part, by_hand)
            return sliced.put(y, part, start), sliced.put(count, sliced.take(count, start, size) + 1, start)

        y, count = slices.in_slices(shard, size, body, (np.zeros_like(x), np.zeros_like(x)))
        np.testing.assert_array_equal(y, x)
        assert (count == 1).all()


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_rounding_up(number, multiple):
    quotient, rounded = slices.ceil_div(number, multiple), slices.round_up(number, multiple)
    assert quotient * multiple == rounded and 0 <= rounded - number < multiple


@given(st.lists(st.integers(1, 700), max_size=2), st.integers(1, 5000), st.sampled_from(["bfloat16", "float32"]))
def test_a_cpu_takes_some_512_tokens_at_once(batch, length, dtype):
    """A chunk holds at most one position more than 512 tokens do. In bfloat16 there are two chunks or more."""
    chunk, rows = cpu.chunk_size((*batch, length, 8), np.dtype(dtype)), int(np.prod(batch))
    if chunk is None:
        assert rows * length <= (511 if dtype == "bfloat16" else 512)
    else:
        assert 1 <= chunk <= length and rows * (chunk - 1) < 512 <= rows * length
        assert chunk < length or length == 1 or dtype == "float32"


@settings(max_examples=4, phases=[Phase.generate])  # each compiles: to look for a smaller failure would take minutes
@given(
    st.integers(2, 40),
    st.integers(1, 24),
    st.integers(1, 700),
    st.integers(1, 12),
    st.sampled_from(SAVES),
    st.booleans(),
)
def test_the_op_equals_the_oracle_for_any_sizes(length, embed_dim, hidden_dim, chunks, save, use_bias):
    chunk_size = slices.ceil_div(length, chunks)
    arrays, x, dy = case((length,), use_bias, embed_dim=embed_dim, hidden_dim=hidden_dim)
    result = run(arrays, x, dy, "float32", jit=True, save=save, chunk_size=chunk_size)
    for name, error in errors(result, exact_result(arrays, x, dy, "gelu_tanh")).items():
        assert error <= FLOAT32_BOUND, name
