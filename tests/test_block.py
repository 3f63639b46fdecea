"""RMSNorm and the whole block equal the float64 oracle, and round nothing but what is stored."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import MLPBlockParams, MLPConfig, RMSNormParams, mlp_block, rms_norm
from gemma_mlp.testing import oracle
from gemma_mlp.testing.oracle import relative_error
from tests.support import samples
from tests.support.cases import CASES, EMBED_DIM, FLOAT32_BOUND, FLOOR_FACTOR, HIDDEN_DIM, NORM_EPS
from tests.support.cases import block_case as case
from tests.support.cases import block_errors as errors
from tests.support.cases import exact_block_result as exact_result
from tests.support.cases import run_block as run
from tests.support.vary import vary

pytestmark = pytest.mark.usefixtures("quick_to_compile")


class TestRMSNorm:
    def case(self, batch, scale=1.0):
        rng = np.random.default_rng(0)
        return (
            samples.normal(rng, (EMBED_DIM,), 0.5),
            samples.normal(rng, (*batch, EMBED_DIM), scale),
            samples.normal(rng, (*batch, EMBED_DIM)),
        )

    @vary(
        "batch jit plus_one", itertools.product(samples.BATCHES, (False, True), (True, False)), together="jit plus_one"
    )
    def test_float32_value_and_gradients_equal_the_oracle(self, batch, jit, plus_one):
        scale, x, dy = self.case(batch)
        function = functools.partial(rms_norm, scale_plus_one=plus_one)
        function = jax.jit(function) if jit else function
        y, dscale, dx = samples.value_and_pullback(function, jnp.float32(scale), jnp.float32(x), dy)
        assert relative_error(y, oracle.rms_norm(scale, x, 1e-6, plus_one)) <= FLOAT32_BOUND
        expected_dscale, expected_dx = oracle.rms_norm_gradients(scale, x, dy, 1e-6, plus_one)
        assert relative_error(dscale, expected_dscale) <= FLOAT32_BOUND
        assert relative_error(dx, expected_dx) <= FLOAT32_BOUND

    @pytest.mark.parametrize("plus_one", [True, False])
    def test_bfloat16_rounds_once(self, plus_one):
        scale, x, _ = self.case((256,))
        exact = oracle.rms_norm(scale, x, 1e-6, plus_one)
        floor = relative_error(oracle.bfloat16(exact), exact)
        y = rms_norm(jnp.asarray(scale, "bfloat16"), jnp.asarray(x, "bfloat16"), scale_plus_one=plus_one)
        assert y.dtype == jnp.bfloat16
        assert relative_error(y, exact) <= 1.001 * floor

    @pytest.mark.parametrize("eps", [1e-6, 1e-2])
    def test_eps_is_added_to_the_mean_square_under_the_root(self, eps):
        scale, x, _ = self.case((3,), scale=1e-3)  # a mean square of 1e-6, where eps decides
        y = rms_norm(jnp.float32(scale), jnp.float32(x), eps=eps)
        assert relative_error(y, oracle.rms_norm(scale, x, eps)) <= FLOAT32_BOUND

    @pytest.mark.parametrize("plus_one", [True, False])
    def test_a_new_scale_is_the_identity_on_normalised_input(self, plus_one):
        x = np.float32(np.sign(self.case((3,))[1]))
        params = RMSNormParams.init(MLPConfig(EMBED_DIM, 1, scale_plus_one=plus_one), jax.random.key(0))
        np.testing.assert_array_equal(params.scale, np.full(EMBED_DIM, 0 if plus_one else 1, np.float32))
        y = rms_norm(params.scale, jnp.asarray(x), scale_plus_one=plus_one)
        np.testing.assert_allclose(y, x, rtol=1e-6)

    def test_mixed_dtypes_give_the_wider_one_unless_a_dtype_is_given(self):
        scale, x, _ = self.case((3,))
        scale, x = jnp.float32(scale), jnp.asarray(x, "bfloat16")
        assert rms_norm(scale, x).dtype == jnp.float32
        assert rms_norm(scale, x, dtype="bfloat16").dtype == jnp.bfloat16

    @pytest.mark.parametrize(
        ("scale", "x", "message"),
        [
            (jnp.zeros(4), jnp.zeros((2, 5)), r": scale float32\[4\], x float32\[2, 5\]. Fix: "),
            (jnp.zeros((1, 5)), jnp.zeros((2, 5)), r"scale must be \[D\]"),
            (jnp.zeros(()), jnp.zeros(()), r"scale must be \[D\]"),
            (jnp.zeros(5), jnp.zeros((2, 5), "float16"), "x must be an array of"),
            (jnp.zeros(5, "int32"), jnp.zeros((2, 5)), "scale must be an array of"),
        ],
    )
    def test_wrong_shapes_and_dtypes_are_explained(self, scale, x, message):
        with pytest.raises(ValueError, match=message):
            rms_norm(scale, x)


BLOCK_CASES = [(*row, True) for row in CASES] + [("gelu_tanh", False, (2, 3), jit, False) for jit in (True, False)]


@vary("activation use_bias batch jit plus_one", BLOCK_CASES)
def test_float32_equals_the_oracle(activation, use_bias, batch, jit, plus_one):
    arrays, x, dy = case(batch, use_bias)
    result = run(arrays, x, dy, "float32", jit=jit, activation=activation, scale_plus_one=plus_one)
    assert result[0].shape == x.shape and result[0].dtype == jnp.float32
    for name, error in errors(result, exact_result(arrays, x, dy, activation, plus_one=plus_one)).items():
        assert error <= FLOAT32_BOUND, name


@vary("activation use_bias batch jit plus_one", BLOCK_CASES)
def test_bfloat16_is_at_the_floor_of_rounding_what_is_stored(activation, use_bias, batch, jit, plus_one):
    arrays, x, dy = case(batch, use_bias)
    exact = exact_result(arrays, x, dy, activation, plus_one=plus_one)
    floor = errors(exact_result(arrays, x, dy, activation, stored=oracle.bfloat16, plus_one=plus_one), exact)
    result = run(arrays, x, dy, "bfloat16", jit=jit, activation=activation, scale_plus_one=plus_one)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result)} == {"bfloat16"}
    for name, error in errors(result, exact).items():
        assert error <= FLOOR_FACTOR * floor[name], name


def test_post_norm_can_be_left_out_as_in_gemma_1():
    arrays, x, dy = case((3,), post_norm=False)
    for name, error in errors(run(arrays, x, dy, "float32", post_norm=False), exact_result(arrays, x, dy)).items():
        assert error <= FLOAT32_BOUND, name


def test_square_weights_are_not_transposed():
    arrays, x, dy = case((3,), embed_dim=64, hidden_dim=64)
    for name, error in errors(run(arrays, x, dy, "float32"), exact_result(arrays, x, dy)).items():
        assert error <= FLOAT32_BOUND, name


def test_eps_reaches_both_norms():
    """The pre-norm of a tiny input and the post-norm of a tiny output both depend on where eps is added."""
    arrays, x, dy = case((3,), scale=1e-2)
    arrays["mlp"]["down_proj"] *= 2.0**-7
    eps = 1e-4
    exact = exact_result(arrays, x, dy, eps=eps)
    for name, error in errors(run(arrays, x, dy, "float32", norm_eps=eps), exact).items():
        assert error <= FLOAT32_BOUND, name


def test_the_residual_stream_keeps_its_dtype():
    arrays, x, _ = case((3,))
    params = samples.block_params(arrays, "float32")
    config = MLPConfig(EMBED_DIM, HIDDEN_DIM, dtype="bfloat16")
    for dtype in ("float32", "bfloat16"):
        assert mlp_block(params, jnp.asarray(x, dtype), config).dtype == dtype
    # What the block adds to a large float32 residual stream has the error of bf16 matmuls: the stream is not rounded.
    x = 64 * x
    added = np.float64(mlp_block(params, jnp.float32(x), config)) - x
    assert relative_error(added, oracle.block(arrays, x, "gelu_tanh", NORM_EPS) - x) <= 5e-3


def test_three_arrays_of_a_block_are_saved_for_the_backward_pass():
    """JAX saves the inputs of the block, the MLP and the post-norm in bfloat16, and no float32 array of a norm."""
    arrays, x, _ = case((3, 5))
    params, x = samples.block_params(arrays, "bfloat16"), jnp.asarray(x, "bfloat16")
    _, pull_back = jax.vjp(functools.partial(mlp_block, config=MLPConfig(EMBED_DIM, HIDDEN_DIM)), params, x)
    leaves = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]
    assert [leaf.dtype.name for leaf in leaves if leaf.shape[:2] == (3, 5)] == ["bfloat16"] * 3


def test_dropout_acts_only_with_a_key():
    arrays, x, _ = case((3,))
    params, x = samples.block_params(arrays, "float32"), jnp.float32(x)
    config = MLPConfig(EMBED_DIM, HIDDEN_DIM, dropout_rate=0.5)
    plain = mlp_block(params, x, MLPConfig(EMBED_DIM, HIDDEN_DIM))
    np.testing.assert_array_equal(mlp_block(params, x, config), plain)
    first, second = (mlp_block(params, x, config, dropout_key=jax.random.key(seed)) for seed in (0, 1))
    assert not jnp.array_equal(first, plain) and not jnp.array_equal(first, second)


def test_init_makes_what_the_config_asks_for():
    params = MLPBlockParams.init(MLPConfig(4, 8, param_dtype="bfloat16"), jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert not jnp.any(params.pre_norm.scale) and params.post_norm is not None and not jnp.any(params.post_norm.scale)
    assert MLPBlockParams.init(MLPConfig(4, 8, post_norm=False), jax.random.key(0)).post_norm is None
    config = MLPConfig(4, 8, use_bias=True, scale_plus_one=False)
    params = MLPBlockParams.init(config, jax.random.key(0))
    assert params.post_norm is not None and (params.pre_norm.scale == 1).all() and (params.post_norm.scale == 1).all()
    assert params.mlp.down_bias is not None and not jnp.any(params.mlp.down_bias)  # of the same shape as a norm
    stacked = MLPBlockParams.specs(config, layers=3).pre_norm.scale
    assert (stacked.init(jax.random.key(0), stacked.shape, "float32") == jnp.ones((3, 4))).all()


def test_recomputed_norms_have_no_barriers():
    """In an unrolled stack on TPUs barriers would take more memory, which tests/aot measures."""
    params = MLPBlockParams.init(MLPConfig(8, 16), jax.random.key(0))
    program = str(jax.make_jaxpr(functools.partial(mlp_block, config=MLPConfig(8, 16)))(params, jnp.ones((2, 8))))
    assert program.count("prevent_cse=False") == 2 and "prevent_cse=True" not in program
