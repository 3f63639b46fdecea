"""The CPU's forms of a matmul, inside every transformation, have the error of rounding the exact result once."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import MLPBlockParams, MLPConfig, MLPParams, feed_forward, hidden_activations, mlp_block
from gemma_mlp.op import matmuls
from gemma_mlp.op.backend import Op
from gemma_mlp.testing.oracle import relative_error
from tests.support import samples
from tests.support.vary import vary

BOUNDS = {"float32": 1e-6, "bfloat16": 2**-8 / 3**0.5}  # bfloat16's is one rounding of the result


def case(*shape, seed=0):
    exact = samples.normal(np.random.default_rng(seed), shape)
    return exact, jnp.asarray(exact, "bfloat16")


def op(on_cpu):
    return Op(MLPConfig(24, 8), jnp.dtype("bfloat16"), on_cpu=on_cpu)


TOKENS = ((), (1,), (1, 1), (2,), (0,), (2, 3))
ON_CPU = (False, True, None)  # None: known only once it is lowered


@vary(
    "tokens transpose on_cpu result",
    itertools.product(TOKENS, [False, True], ON_CPU, ["float32", "bfloat16"]),
    together="tokens transpose on_cpu result",
)
def test_multiply(tokens, transpose, on_cpu, result):
    (a, a_bf16), (weight, weight_bf16) = case(*tokens, 24), case(*((8, 24) if transpose else (24, 8)), seed=1)
    matmul = functools.partial(matmuls.matmul, op(on_cpu), result, transpose=transpose)
    got = jax.jit(matmul)(a_bf16, weight_bf16)
    assert got.shape == (*tokens, 8) and got.dtype == result
    assert relative_error(got, a @ (weight.T if transpose else weight)) <= BOUNDS[result]


ROWS = (3, 8, 60)  # fewer rows than blocks, as many rows as blocks, blocks of which the last is smaller


@vary(
    "tokens rows on_cpu result",
    itertools.product([(), (1,), (0,), (4, 3), (256,), (2, 150)], ROWS, [False, True], ["float32", "bfloat16"]),
    together="tokens rows on_cpu result",
)
def test_outer(tokens, rows, on_cpu, result):
    (a, a_bf16), (b, b_bf16) = case(*tokens, rows), case(*tokens, 16, seed=1)
    got = jax.jit(functools.partial(matmuls.outer, op(on_cpu), result=result))(a_bf16, b_bf16)
    assert got.shape == (rows, 16) and got.dtype == result
    assert relative_error(got, a.reshape(-1, rows).T @ b.reshape(-1, 16)) <= BOUNDS[result]


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
@pytest.mark.parametrize("transform", ["vmap", "scan", "remat"])
def test_outer_inside_a_transformation(transform, result):
    """XLA's CPU backend compiles some matmuls that it then cannot run, when an operand comes out of a loop."""
    (a, a_bf16), (b, b_bf16) = case(3, 256, 60), case(3, 256, 16, seed=1)
    outer = functools.partial(matmuls.outer, op(on_cpu=True), result=result)
    function = {
        "vmap": jax.vmap(outer),
        "scan": lambda a, b: jax.lax.scan(lambda carry, ab: (carry, outer(*ab)), None, (a, b))[1],
        "remat": jax.vmap(jax.checkpoint(outer)),
    }[transform]
    got = jax.jit(function)(a_bf16, b_bf16)
    assert relative_error(got, np.einsum("ltd,ltf->ldf", a, b)) <= BOUNDS[result]


def test_no_weights_gradient_is_whole_in_float32():
    """The sums are rounded block by block. With few tokens a gradient takes as long as writing them does."""
    params = jax.tree.map(lambda a: a.astype("bfloat16"), MLPParams.init(MLPConfig(24, 40), jax.random.key(0)))
    gradients = jax.grad(lambda params, x: feed_forward(params, x).astype("float32").sum())
    program = str(jax.make_jaxpr(gradients)(params, jnp.ones((4, 24), "bfloat16")))
    assert "bf16[24,40]" in program and "f32[12,40]" in program  # a block of two
    assert "f32[24,40]" not in program and "f32[40,24]" not in program


SYMBOLIC = jax.export.symbolic_shape("batch, 4, 8")


@pytest.mark.parametrize(
    ("function", "shape", "dtype", "choices"),
    [
        (feed_forward, (2, 4, 8), "float32", 0),
        (feed_forward, SYMBOLIC, "float32", 0),
        (feed_forward, (512, 8), "float32", 0),
        (functools.partial(feed_forward, save="gate_up"), (8,), "float32", 0),
        (functools.partial(feed_forward, chunk_size=100), (513, 8), "float32", 0),
        (hidden_activations, (513, 8), "float32", 0),
        (feed_forward, (513, 8), "float32", 1),  # a CPU takes them in chunks
        (feed_forward, SYMBOLIC, "bfloat16", 1),  # a CPU does not round between matmuls
    ],
)
def test_the_platform_is_chosen_only_where_programs_differ(function, shape, dtype, choices):
    """Exporters to other formats, such as jax2onnx, know no choice of the platform."""
    params, x = MLPParams.init(MLPConfig(8, 16), jax.random.key(0)), jax.ShapeDtypeStruct(shape, dtype)
    program = jax.make_jaxpr(functools.partial(function, dtype=dtype))(params, x)
    assert str(program).count("platform_index") == choices


@pytest.mark.needs_cpu
@pytest.mark.parametrize(
    ("dtype", "save", "bound"), [("bfloat16", "input", 41), ("float32", "input", 19), ("float32", "gate_up", 19)]
)
def test_an_unrolled_stack_does_not_compute_its_backward_pass_early(dtype, save, bound):
    """Temporary memory in [T, F] arrays of `dtype`. Without the barrier on dh: 48, 21 and 21 on JAX 0.10.2."""
    config, tokens = MLPConfig(64, 512, save=save, dtype=dtype), 256
    layers = [MLPBlockParams.init(config, jax.random.key(0))] * 4
    layers = jax.tree.map(lambda a: a.astype(dtype), layers)

    def loss(layers, x):
        for params in layers:
            x = mlp_block(params, x, config)
        return jnp.square(x.astype("float32")).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(layers, jnp.ones((tokens, 64), dtype)).compile()
    array_bytes = tokens * 512 * jnp.dtype(dtype).itemsize
    assert gradient.memory_analysis().temp_size_in_bytes <= bound * array_bytes
