"""The products in every form, inside every transformation: the same numbers as in float64, rounded once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import MLPConfig, MLPParams, feed_forward
from gemma_mlp.op import xla
from gemma_mlp.op.backend import Op
from gemma_mlp.testing import samples
from gemma_mlp.testing.oracle import relative_error

BOUNDS = {"float32": 1e-6, "bfloat16": 2**-8 / 3**0.5}  # of bfloat16: one rounding of the result


def case(*shape, seed=0):
    exact = samples.normal(np.random.default_rng(seed), shape)
    return exact, jnp.asarray(exact, "bfloat16")


def op(on_cpu):
    return Op(MLPConfig(24, 8), jnp.dtype("bfloat16"), on_cpu=on_cpu)


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
@pytest.mark.parametrize("on_cpu", [False, True, None])  # None: known only once it is lowered
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("tokens", [(), (1,), (1, 1), (2,), (0,), (2, 3)], ids=str)
def test_multiply(tokens, transpose, on_cpu, result):
    (a, a_bf16), (weight, weight_bf16) = case(*tokens, 24), case(*((8, 24) if transpose else (24, 8)), seed=1)
    matmul = functools.partial(xla.matmul, op(on_cpu), result, transpose=transpose)
    got = jax.jit(matmul)(a_bf16, weight_bf16)
    assert got.shape == (*tokens, 8) and got.dtype == result
    assert relative_error(got, a @ (weight.T if transpose else weight)) <= BOUNDS[result]


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("rows", [3, 8, 60])  # fewer than the blocks, as many, blocks with a tail
@pytest.mark.parametrize("tokens", [(), (1,), (0,), (4, 3), (256,), (2, 150)], ids=str)
def test_outer(tokens, rows, on_cpu, result):
    (a, a_bf16), (b, b_bf16) = case(*tokens, rows), case(*tokens, 16, seed=1)
    got = jax.jit(functools.partial(xla.outer, op(on_cpu), result=result))(a_bf16, b_bf16)
    assert got.shape == (rows, 16) and got.dtype == result
    assert relative_error(got, a.reshape(-1, rows).T @ b.reshape(-1, 16)) <= BOUNDS[result]


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
@pytest.mark.parametrize("transform", ["vmap", "scan", "remat"])
def test_outer_inside_a_transformation(transform, result):
    """XLA's CPU backend has products that it compiles and cannot run when an operand comes out of a loop."""
    (a, a_bf16), (b, b_bf16) = case(3, 256, 60), case(3, 256, 16, seed=1)
    outer = functools.partial(xla.outer, op(on_cpu=True), result=result)
    function = {
        "vmap": jax.vmap(outer),
        "scan": lambda a, b: jax.lax.scan(lambda carry, ab: (carry, outer(*ab)), None, (a, b))[1],
        "remat": jax.vmap(jax.checkpoint(outer)),
    }[transform]
    got = jax.jit(function)(a_bf16, b_bf16)
    assert relative_error(got, np.einsum("ltd,ltf->ldf", a, b)) <= BOUNDS[result]


def test_no_weights_gradient_is_whole_in_float32():
    """Its sums are rounded block by block: at few tokens the time of a gradient is that of writing these."""
    params = jax.tree.map(lambda a: a.astype("bfloat16"), MLPParams.init(MLPConfig(24, 40), jax.random.key(0)))
    gradients = jax.grad(lambda params, x: feed_forward(params, x).astype("float32").sum())
    program = str(jax.make_jaxpr(gradients)(params, jnp.ones((4, 24), "bfloat16")))
    assert "bf16[24,40]" in program and "f32[12,40]" in program  # a block of two
    assert "f32[24,40]" not in program and "f32[40,24]" not in program
