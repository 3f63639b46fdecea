import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import rms_norm
from gemma_mlp.testing import oracle, samples
from gemma_mlp.testing.oracle import relative_error

EMBED_DIM = 64


def case(batch, scale=1.0):
    rng = np.random.default_rng(0)
    return (
        samples.normal(rng, (EMBED_DIM,), 0.5),
        samples.normal(rng, (*batch, EMBED_DIM), scale),
        samples.normal(rng, (*batch, EMBED_DIM)),
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("batch", samples.BATCHES, ids=str)
def test_float32_value_and_gradients_equal_the_oracle(batch, jit):
    scale, x, dy = case(batch)
    function = jax.jit(rms_norm) if jit else rms_norm
    y, dscale, dx = samples.value_and_pullback(function, jnp.float32(scale), jnp.float32(x), dy)
    assert relative_error(y, oracle.rms_norm(scale, x, 1e-6)) <= 1e-6
    expected_dscale, expected_dx = oracle.rms_norm_gradients(scale, x, dy, 1e-6)
    assert relative_error(dscale, expected_dscale) <= 1e-6
    assert relative_error(dx, expected_dx) <= 1e-6


def test_bfloat16_rounds_once():
    scale, x, _ = case((256,))
    exact = oracle.rms_norm(scale, x, 1e-6)
    floor = relative_error(oracle.bfloat16(exact), exact)
    y = rms_norm(jnp.asarray(scale, "bfloat16"), jnp.asarray(x, "bfloat16"))
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, exact) <= 1.001 * floor


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps_is_added_to_the_mean_square_under_the_root(eps):
    scale, x, _ = case((3,), scale=1e-3)  # a mean square of 1e-6, where eps decides
    y = rms_norm(jnp.float32(scale), jnp.float32(x), eps=eps)
    assert relative_error(y, oracle.rms_norm(scale, x, eps)) <= 1e-6


def test_a_zero_scale_is_the_identity_on_normalised_input():
    x = np.float32(np.sign(case((3,))[1]))
    np.testing.assert_allclose(rms_norm(jnp.zeros(EMBED_DIM), jnp.asarray(x)), x, rtol=1e-6)


def test_mixed_dtypes():
    scale, x, _ = case((3,))
    scale, x = jnp.float32(scale), jnp.asarray(x, "bfloat16")
    assert rms_norm(scale, x).dtype == jnp.float32
    assert rms_norm(scale, x, dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("scale", "x", "message"),
    [
        (jnp.zeros(4), jnp.zeros((2, 5)), r"Received: scale float32\[4\], x float32\[2, 5\]. Fix: "),
        (jnp.zeros((1, 5)), jnp.zeros((2, 5)), r"scale is \[D\]"),
        (jnp.zeros(()), jnp.zeros(()), r"scale is \[D\]"),
        (jnp.zeros(5), jnp.zeros((2, 5), "float16"), "x is an array of"),
        (jnp.zeros(5, "int32"), jnp.zeros((2, 5)), "scale is an array of"),
    ],
)
def test_errors(scale, x, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(scale, x)
