"""Chunks of tokens and slices of F change no number and make no array of [T, F]."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from gemma_mlp import MLPConfig, MLPParams, feed_forward, mlp
from gemma_mlp.testing import oracle
from gemma_mlp.testing.oracle import relative_error
from tests.support import samples
from tests.support.cases import FLOAT32_BOUND, FLOOR_FACTOR, SAVES, case, errors, exact_result, floor_errors, run
from tests.support.vary import vary

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# These make 1, 2, 3 and 7 chunks of 7 tokens, and slices of F of 384, 256, 128 and 128. The last may be smaller.
CHUNKS = (100, 4, 3, 1)
HIDDEN_DIM = 320


BATCHES = (((7,), False), ((2, 7), True), ((2, 0), True), ((), True))  # batch, use_bias


@vary(
    "batch chunk_size save",
    itertools.product(BATCHES, CHUNKS, (*SAVES, "autodiff")),
    together="batch save",
)
def test_float32_equals_the_oracle(batch, chunk_size, save):
    batch, use_bias = batch
    arrays, x, dy = case(batch, use_bias, hidden_dim=HIDDEN_DIM)
    result = run(arrays, x, dy, "float32", jit=True, save=save, chunk_size=chunk_size)
    assert result[0].shape == x.shape
    for name, error in errors(result, exact_result(arrays, x, dy, "gelu_tanh")).items():
        assert error <= FLOAT32_BOUND, name


@vary("batch chunk_size save", itertools.product(BATCHES[:2], CHUNKS, SAVES))
def test_bfloat16_is_at_the_floor(batch, chunk_size, save):
    batch, use_bias = batch
    arrays, x, dy = case(batch, use_bias, hidden_dim=HIDDEN_DIM)
    exact = exact_result(arrays, x, dy, "gelu_tanh")
    floor = floor_errors(arrays, x, dy, "gelu_tanh", exact, save)
    result = run(arrays, x, dy, "bfloat16", jit=True, save=save, chunk_size=chunk_size)
    for name, error in errors(result, exact).items():
        assert error <= FLOOR_FACTOR * floor[name], name


@vary(
    "save dtype remat",
    itertools.product(SAVES, ("float32", "bfloat16"), (False, True)),
    together="save remat",
)
def test_scan_remat_and_vmap_around_chunks(save, dtype, remat):
    """This also shows that no matmul fails on a CPU when its operands come out of a loop inside a loop."""
    layers = [samples.mlp_params(case((), seed=seed, hidden_dim=HIDDEN_DIM)[0], dtype) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = jnp.asarray(case((2, 5))[1], dtype)

    def gradients(chunk_size):
        step = functools.partial(feed_forward, save=save, chunk_size=chunk_size)
        step = jax.checkpoint(step) if remat else step

        def loss(stacked, x):
            x, _ = jax.lax.scan(lambda x, params: (x + jax.vmap(step, in_axes=(None, 0))(params, x), None), x, stacked)
            return x.sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(stacked, x)

    bound = FLOAT32_BOUND if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    for a, b in zip(jax.tree.leaves(gradients(2)), jax.tree.leaves(gradients(None))):
        assert relative_error(a, np.asarray(b, np.float64)) <= bound


@pytest.mark.parametrize("save", SAVES)
def test_dropout_drops_the_same_elements(save):
    arrays, x, dy = case((7,), hidden_dim=HIDDEN_DIM)
    options = {"dropout_rate": 0.25, "dropout_key": jax.random.key(0), "save": save}
    whole = run(arrays, x, dy, "float32", jit=True, **options)
    chunked = run(arrays, x, dy, "float32", jit=True, chunk_size=2, **options)
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole)):
        assert relative_error(a, np.float64(b)) <= FLOAT32_BOUND


def sizes(jaxpr):
    """Yields the number of elements of every array that a program makes, in loops and branches too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize(("save", "saved"), [("input", False), ("gate_up", True)])
def test_no_array_of_all_tokens_and_all_of_f(save, saved):
    tokens, embed_dim, hidden_dim = 64, 8, 1024
    params = MLPParams.init(MLPConfig(embed_dim, hidden_dim), jax.random.key(0))
    x = jnp.ones((tokens, embed_dim))

    def largest(chunk_size):
        def loss(params, x):
            return feed_forward(params, x, save=save, chunk_size=chunk_size).sum()

        return max(sizes(jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr))

    assert largest(None) == tokens * hidden_dim
    assert largest(8) == (tokens * hidden_dim if saved else embed_dim * hidden_dim)


@pytest.mark.parametrize(
    ("dtype", "batch", "share"),
    [
        ("bfloat16", (512,), 0.6),
        ("float32", (1024,), 0.6),
        ("bfloat16", (3, 600), 0.35),
        ("float32", (600, 3), 0.35),
        ("bfloat16", (511,), 1),
        ("float32", (512,), 1),
    ],
    ids=str,
)
def test_a_cpu_takes_many_tokens_in_chunks(dtype, batch, share):
    """Without a gradient only a chunk, `share` of [T, F], is in memory. With one, all of [T, F] is used again."""
    arrays, x, _ = case(batch, hidden_dim=HIDDEN_DIM)
    params, inputs = samples.mlp_params(arrays, dtype), jnp.asarray(x, dtype)

    def compiled(function):
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return jax.jit(function).lower(params, inputs).compile()

    def temp_bytes(function):
        return compiled(function).memory_analysis().temp_size_in_bytes

    whole = functools.partial(feed_forward, chunk_size=max(batch))
    assert share / 2 <= temp_bytes(feed_forward) / temp_bytes(whole) <= share
    y, _ = oracle.mlp(arrays, x, "gelu_tanh")
    stored, _ = oracle.mlp(arrays, x, "gelu_tanh", oracle.bfloat16)
    bound = FLOAT32_BOUND if dtype == "float32" else FLOOR_FACTOR * relative_error(stored, y)
    assert relative_error(compiled(feed_forward)(params, inputs), y) <= bound

    def gradient(layer):
        return jax.grad(lambda params, x: layer(params, x).astype("float32").sum())

    assert temp_bytes(gradient(feed_forward)) == temp_bytes(gradient(whole))


def test_a_cpu_leaves_the_tokens_of_a_mesh_where_they_are(eight_devices):
    params, x = samples.mlp_params(case(())[0], "bfloat16"), jnp.ones((8, 128, 64), "bfloat16")

    def loops():
        return str(jax.make_jaxpr(feed_forward)(params, x)).count("scan[")

    assert loops() > 0
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))):
        assert loops() == 0


def test_a_config_passes_it_on():
    config = MLPConfig(8, 256, chunk_size=2)
    params = MLPParams.init(config, jax.random.key(0))
    assert "scan" in str(jax.make_jaxpr(lambda params, x: mlp(params, x, config))(params, jnp.ones((5, 8))))


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True, "2"])
def test_a_wrong_chunk_size_is_explained(chunk_size):
    params = MLPParams.init(MLPConfig(8, 16), jax.random.key(0))
    message = f"chunk_size must be a whole number of at least 1.*: {chunk_size!r}"
    with pytest.raises(ValueError, match=message):
        feed_forward(params, jnp.ones((5, 8)), chunk_size=chunk_size)
    with pytest.raises(ValueError, match=message):
        MLPConfig(8, 16, chunk_size=chunk_size)
