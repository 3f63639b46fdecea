"""The feed-forward against the float64 oracle, under every transformation, and its errors."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import PRESETS, MLPConfig, MLPParams, feed_forward, hidden_activations
from gemma_mlp.op import vjp
from gemma_mlp.testing import oracle
from gemma_mlp.testing.oracle import relative_error
from gemma_mlp.testing.stacks import plain
from tests.support import samples
from tests.support.cases import (
    CASES,
    EMBED_DIM,
    FLOAT32_BOUND,
    FLOOR_FACTOR,
    HIDDEN_DIM,
    SAVES,
    case,
    errors,
    exact_result,
    floor_errors,
    run,
)
from tests.support.vary import slow, vary


@vary(
    "activation use_bias batch jit save",
    [(*case, save) for case in CASES for save in (*SAVES, "autodiff")],
    together="use_bias batch save",
)
def test_float32_equals_the_oracle(activation, use_bias, batch, jit, save):
    arrays, x, dy = case(batch, use_bias)
    result = run(arrays, x, dy, "float32", jit=jit, activation=activation, save=save)
    assert result[0].shape == x.shape and result[0].dtype == jnp.float32
    for name, error in errors(result, exact_result(arrays, x, dy, activation)).items():
        assert error <= FLOAT32_BOUND, name


@vary(
    "activation use_bias batch jit save",
    [(*case, save) for case in CASES for save in SAVES],
    together="use_bias batch save",
)
def test_bfloat16_is_at_the_floor_of_rounding_what_is_stored(activation, use_bias, batch, jit, save):
    arrays, x, dy = case(batch, use_bias)
    exact = exact_result(arrays, x, dy, activation)
    floor = floor_errors(arrays, x, dy, activation, exact, save)
    result = run(arrays, x, dy, "bfloat16", jit=jit, activation=activation, save=save)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result)} == {"bfloat16"}
    for name, error in errors(result, exact).items():
        assert error <= FLOOR_FACTOR * floor[name], name


@pytest.fixture(scope="module")
def case_2b():
    """The arrays, x and dy of a layer of Gemma 2 2B, and the exact result."""
    config = PRESETS["gemma2_2b"]
    arrays, x, dy = case((64,), embed_dim=config.embed_dim, hidden_dim=config.hidden_dim)
    return arrays, x, dy, exact_result(arrays, x, dy, "gelu_tanh")


@pytest.mark.slow
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("save", SAVES)
def test_bfloat16_at_2b_sizes(param_dtype, save, case_2b):
    """The error of y is at the floor of 2.34e-3. A plain bf16 module, which runs here too, is far above."""
    arrays, x, dy, exact = case_2b
    weights = oracle.bfloat16 if param_dtype == "bfloat16" else oracle.exact
    floor = floor_errors(arrays, x, dy, "gelu_tanh", exact, save, weights=weights)
    result = run(arrays, x, dy, "bfloat16", jit=True, param_dtype=param_dtype, dtype="bfloat16", save=save)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result[1])} == {param_dtype}
    measured = errors(result, exact)
    for name, error in measured.items():
        assert error <= FLOOR_FACTOR * floor[name], name
    on_cpu = jax.default_backend() == "cpu"
    assert floor["y"] == pytest.approx(2.34e-3 if on_cpu else 3.4e-3, rel=0.02)
    if save == "input" and on_cpu:  # only h, y and what a gradient stores once are ever rounded
        assert max(measured.values()) <= FLOOR_FACTOR * 2.34e-3

    params, x = samples.mlp_params(arrays, "bfloat16"), jnp.asarray(x, "bfloat16")
    assert relative_error(plain(params, x), exact[0]) >= 1.2 * measured["y"]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("use_bias", [False, True])
def test_what_accelerators_run_rounds_gate_and_up_once_more(use_bias, save, monkeypatch):
    """TPUs and GPUs take a branch that a CPU does not take. Here the CPU computes that branch, one operation at a time:
    compiled as one program it would leave out the roundings."""
    monkeypatch.setattr(vjp, "_by_platform", lambda op, function, *args, **_: function(op, *args))
    arrays, x, dy = case((256,), use_bias)
    with jax.disable_jit():
        result = run(arrays, x, dy, "bfloat16", save=save)
    measured = errors(result, exact_result(arrays, x, dy, "gelu_tanh"))
    # Measured errors are 3.1e-3 to 3.5e-3, of y and of gradients. At 2B sizes plain bf16 has 4.2e-3 and up to 5.2e-3.
    assert measured["y"] >= 2.9e-3
    assert max(measured.values()) <= 3.6e-3


def test_weight_gradients_accumulate_in_float32_however_many_tokens():
    arrays, x, dy = case((4096,))
    exact = exact_result(arrays, x, dy, "gelu_tanh")
    result = run(arrays, x, dy, "bfloat16", param_dtype="float32", dtype="bfloat16", jit=True)
    # Rounding an operand once to bf16 has an error of at most 2^-8 / sqrt(3) = 2.26e-3. Accelerators round gate, up and
    # dh too: up to 3.6e-3, as above.
    bound = 2**-8 / 3**0.5 if jax.default_backend() == "cpu" else 3.6e-3
    for name, error in errors(result, exact).items():
        if name.endswith("proj"):
            assert error <= bound, name


@pytest.mark.parametrize(("save", "chunk_size"), [("input", None), slow("input", 64), slow("gate_up", None)])
def test_float32_gradients_of_bfloat16_compute_are_not_rounded(save, chunk_size):
    """Neither those of weights nor those of biases: only what the matmuls take is rounded to bfloat16."""
    arrays, x, dy = case((256,), use_bias=True)
    options = {"param_dtype": "float32", "dtype": "bfloat16", "save": save, "chunk_size": chunk_size}
    _, dparams, dx = run(arrays, x, dy, "bfloat16", jit=True, **options)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(dparams)} == {"float32"}
    exact = exact_result(arrays, x, dy, "gelu_tanh")
    floor = floor_errors(arrays, x, dy, "gelu_tanh", exact, save, weights=lambda a: a)
    measured = errors((exact[0], dparams, dx), exact)
    assert measured["down_bias"] <= FLOAT32_BOUND  # the sum of dy, in which nothing is rounded
    for name in measured.keys() - {"y", "down_bias"}:
        assert measured[name] <= FLOOR_FACTOR * floor[name], name


def test_mixed_dtypes_follow_the_contract():
    arrays, x, dy = case((3,))
    params, x_bf16 = samples.mlp_params(arrays, "float32"), jnp.asarray(x, "bfloat16")
    assert feed_forward(params, x_bf16).dtype == jnp.float32
    assert feed_forward(params, x_bf16, dtype="bfloat16").dtype == jnp.bfloat16
    _, dparams, dx = run(arrays, x, dy, "float32", param_dtype="bfloat16", dtype="bfloat16")
    assert dx.dtype == jnp.float32 and dparams.down_proj.dtype == jnp.bfloat16


def test_float64_in_64_bit_mode():
    arrays, x, dy = case((2, 3), use_bias=True)
    with jax.enable_x64(True):
        result = run(arrays, x, dy, "float64")
        assert result[0].dtype == jnp.float64
        for name, error in errors(result, exact_result(arrays, x, dy, "gelu_tanh")).items():
            assert error <= 1e-14, name  # 45 eps of float64
    with pytest.raises(ValueError, match="float64 needs JAX's 64-bit mode"):
        run(arrays, x, dy, "float32", dtype="float64")


@vary(
    "save dtype remat",
    itertools.product((*SAVES, "autodiff"), ("float32", "bfloat16"), (False, True)),
    together="save",
)
def test_scan_over_layers_equals_a_loop(save, dtype, remat):
    """This also shows that no matmul fails on a CPU when its operands come out of a loop."""
    layers = [samples.mlp_params(case((), seed=seed)[0], dtype) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = jnp.asarray(case((2, 128))[1], dtype)
    step = functools.partial(feed_forward, save=save)
    step = jax.checkpoint(step) if remat else step

    def scanned(stacked, x):
        return jax.lax.scan(lambda x, params: (x + step(params, x), None), x, stacked)[0].sum()

    def looped(stacked, x):
        for i in range(3):
            x = x + step(jax.tree.map(lambda leaf: leaf[i], stacked), x)
        return x.sum()

    got = jax.jit(jax.grad(scanned, argnums=(0, 1)))(stacked, x)
    expected = jax.jit(jax.grad(looped, argnums=(0, 1)))(stacked, x)
    eps = float(jnp.finfo(dtype).eps)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert relative_error(a, np.asarray(b, np.float64)) <= 2 * eps


@vary(
    "save dtype over_params",
    itertools.product(SAVES, ("float32", "bfloat16"), (False, True)),
    together="save dtype over_params",
)
def test_vmap(save, dtype, over_params):
    layers = [samples.mlp_params(case((), seed=seed)[0], dtype) for seed in range(3)]
    x = jnp.asarray(case((3, 4))[1], dtype)

    bound = FLOAT32_BOUND if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)

    def gradients(params, x):
        return jax.grad(lambda params, x: feed_forward(params, x, save=save).sum(), argnums=(0, 1))(params, x)

    if over_params:
        got = jax.vmap(gradients)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), x)
    else:
        got = jax.vmap(gradients, in_axes=(None, 0))(layers[0], x)
    for i in range(3):
        expected = gradients(layers[i if over_params else 0], x[i])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
            assert relative_error(a[i], np.asarray(b, np.float64)) <= bound


def test_forward_mode_works_where_promised():
    arrays, x, tangent = case((3,))
    params, x, tangent = samples.mlp_params(arrays, "float32"), jnp.float32(x), jnp.float32(tangent)
    step = 1e-6
    expected = (
        oracle.mlp(arrays, np.float64(x) + step * np.float64(tangent), "gelu_tanh")[0]
        - oracle.mlp(arrays, np.float64(x) - step * np.float64(tangent), "gelu_tanh")[0]
    ) / (2 * step)
    forward = functools.partial(feed_forward, params, save="autodiff")
    assert relative_error(jax.jvp(forward, (x,), (tangent,))[1], expected) <= 1e-6
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(feed_forward, params, save="input"), (x,), (tangent,))


@pytest.mark.parametrize("save", SAVES)
def test_forward_over_reverse_works_with_every_policy(save):
    """Hessian-vector products equal those of JAX's own differentiation."""
    arrays, x, tangent = case((3,))
    params, x, tangent = samples.mlp_params(arrays, "float32"), jnp.float32(x), jnp.float32(tangent)

    def hessian_vector_product(save):
        gradient = jax.grad(lambda x: jnp.square(feed_forward(params, x, save=save)).sum())
        return jax.jvp(gradient, (x,), (tangent,))[1]

    assert relative_error(hessian_vector_product(save), np.float64(hessian_vector_product("autodiff"))) <= 1e-6


def saved_shapes(save, dtype="bfloat16"):
    """The (shape, dtype) of each array that is saved for the backward pass, except the arguments."""
    arrays, x, _ = case((5,))
    params, x = samples.mlp_params(arrays, dtype), jnp.asarray(x, dtype)
    _, pull_back = jax.vjp(functools.partial(feed_forward, save=save), params, x)
    arguments = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves((params, x))}
    saved = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]
    return [leaf for leaf in saved if leaf not in arguments]


def test_saved_residuals():
    assert saved_shapes("input") == []
    assert saved_shapes("gate_up") == [((5, HIDDEN_DIM), "bfloat16")] * 2
    assert len([shape for shape, _ in saved_shapes("autodiff") if shape == (5, HIDDEN_DIM)]) > 2


@pytest.mark.parametrize("save", ["gate_up", "autodiff"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_users_own_remat_policy_finds_the_tags(dtype, save):
    arrays, x, _ = case((5,))
    params, x = samples.mlp_params(arrays, dtype), jnp.asarray(x, dtype)
    policy = jax.checkpoint_policies.save_only_these_names("mlp_gate", "mlp_up")

    @functools.partial(jax.checkpoint, policy=policy)
    def function(params, x):
        return jnp.sin(feed_forward(params, x, save=save))

    _, pull_back = jax.vjp(function, params, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "shape")]
    assert shapes.count((5, HIDDEN_DIM)) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("save", "projections"), [("input", 0), ("gate_up", 1), ("autodiff", 1)])
def test_each_tag_is_there_once(save, projections, dtype):
    arrays, x, _ = case((5,))
    params, x = samples.mlp_params(arrays, dtype), jnp.asarray(x, dtype)
    program = str(jax.make_jaxpr(jax.grad(lambda params: feed_forward(params, x, save=save).sum()))(params))
    tags = {"mlp_gate": projections, "mlp_up": projections, "mlp_hidden": 1, "mlp_out": 1}
    assert {tag: program.count(f"name={tag}") for tag in tags} == tags


class TestDropout:
    rate = 0.25

    def hidden(self, key, **options):
        arrays, x, _ = case((512,))
        params, x = samples.mlp_params(arrays, "float32"), jnp.float32(x)
        return params, x, hidden_activations(params, x, dropout_key=key, **options)

    def test_drops_the_rate_and_scales_the_rest(self):
        _, _, plain = self.hidden(None)
        _, _, dropped = self.hidden(jax.random.key(0), dropout_rate=self.rate)
        mask = np.asarray(dropped) != 0
        # For 131,072 draws, six standard deviations of the share are 0.0072.
        assert abs(1 - mask.mean() - self.rate) < 0.0072
        np.testing.assert_allclose(np.asarray(dropped)[mask], np.asarray(plain)[mask] / (1 - self.rate), rtol=1e-6)

    @pytest.mark.parametrize("save", [*SAVES, "autodiff"])
    def test_forward_and_gradients_use_one_mask(self, save):
        key = jax.random.key(0)
        _, x, h = self.hidden(key, dropout_rate=self.rate)
        arrays, _, dy = case((512,))
        options = {"dropout_rate": self.rate, "dropout_key": key, "save": save}
        y, dparams, _ = run(arrays, x, dy, "float32", **options)
        assert relative_error(y, np.float64(h) @ arrays["down_proj"]) <= FLOAT32_BOUND
        assert relative_error(dparams.down_proj, np.float64(h).T @ dy) <= FLOAT32_BOUND
        mask = np.float64(h) != 0
        gate, up = np.float64(x) @ arrays["gate_proj"], np.float64(x) @ arrays["up_proj"]
        dh = dy @ arrays["down_proj"].T * mask / (1 - self.rate)
        expected = np.float64(x).T @ (dh * up * oracle.d_gelu_tanh(gate))
        assert relative_error(dparams.gate_proj, expected) <= FLOAT32_BOUND

    def test_a_rate_without_a_key_is_refused(self):
        params, x, _ = self.hidden(None)
        for function in (feed_forward, hidden_activations):
            with pytest.raises(ValueError, match="needs a dropout_key, which draws the mask"):
                function(params, x, dropout_rate=self.rate)

    def test_a_rate_of_zero_changes_nothing(self):
        np.testing.assert_array_equal(self.hidden(jax.random.key(0))[2], self.hidden(None)[2])
        params, x, _ = self.hidden(None)
        for function in (feed_forward, hidden_activations):  # and draws no mask
            program = jax.make_jaxpr(functools.partial(function, dropout_key=jax.random.key(0)))(params, x)
            assert "random_bits" not in str(program)


def test_hidden_activations_equal_the_oracle():
    arrays, x, _ = case((3,), use_bias=True)
    params = samples.mlp_params(arrays, "float32")
    _, (_, _, h) = oracle.mlp(arrays, x, "silu")
    assert relative_error(hidden_activations(params, jnp.float32(x), activation="silu"), h) <= FLOAT32_BOUND


def test_one_compilation_per_shape():
    arrays, x, _ = case((4,))
    params = samples.mlp_params(arrays, "float32")
    traced = jax.jit(chex.assert_max_traces(n=2)(feed_forward), static_argnames="save")
    for rows in (4, 2, 4, 2, 4):
        traced(params, jnp.float32(x[:rows]), save="input")
    with pytest.raises(AssertionError, match="traced"):
        traced(params, jnp.float32(x[:3]), save="input")


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


GOOD = {"gate_proj": zeros(4, 8), "up_proj": zeros(4, 8), "down_proj": zeros(8, 4)}


@pytest.mark.parametrize(
    ("changes", "x", "options", "message"),
    [
        ({}, zeros(3, 5), {}, r"x must be \[\*B, D\].*: x float32\[3, 5\], gate_proj float32\[4, 8\].*Fix: weights"),
        ({}, zeros(), {}, r": x float32\[\]"),
        ({"up_proj": zeros(4, 9)}, zeros(3, 4), {}, r"up_proj float32\[4, 9\]"),
        ({"down_proj": zeros(4, 8)}, zeros(3, 4), {}, r"transpose those of a torch checkpoint"),
        ({"gate_proj": zeros(4)}, zeros(3, 4), {}, r"gate_proj float32\[4\]"),
        ({"gate_bias": zeros(8)}, zeros(3, 4), {}, "biases must be all given or all None"),
        (
            {"gate_bias": zeros(8), "up_bias": zeros(8), "down_bias": zeros(8)},
            zeros(3, 4),
            {},
            r"down_bias float32\[8\]",
        ),
        ({}, zeros(3, 4, dtype="int32"), {}, r"x must be an array of bfloat16.*: int32\[3, 4\]"),
        ({}, zeros(3, 4, dtype="float16"), {}, "float16 overflows"),
        ({"up_proj": zeros(4, 8, dtype="float16")}, zeros(3, 4), {}, r"up_proj must be an array of"),
        ({}, [[0.0] * 4], {}, ": list"),
        ({}, zeros(3, 4), {"dtype": "float16"}, "65504"),
        ({}, zeros(3, 4), {"activation": "gelu_pytorch_tanh"}, "activation must be one of gelu_tanh"),
        ({}, zeros(3, 4), {"save": "none"}, "save must be one of input, gate_up, autodiff"),
        ({}, zeros(3, 4), {"dropout_rate": 1.5}, r"dropout_rate must be a number in \[0, 1\)"),
    ],
)
def test_errors_state_rule_received_and_fix(changes, x, options, message):
    with pytest.raises(ValueError, match=message):
        feed_forward(MLPParams(**(GOOD | changes)), x, **options)


def test_a_plain_dict_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"params must be an MLPParams.*: dict. Fix: MLPParams\(\*\*tree\)"):
        feed_forward(GOOD, zeros(3, 4))  # pyright: ignore[reportArgumentType]


def test_initialisation_has_unit_gain_and_the_asked_dtype():
    config = MLPConfig(256, 1024, use_bias=True, param_dtype="bfloat16")
    params = MLPParams.init(config, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    for name, fan_in in (("gate_proj", 256), ("up_proj", 256), ("down_proj", 1024)):
        # For 262,144 draws, the standard deviation is known to 0.14 %. Rounding to bf16 adds less.
        assert float(jnp.std(getattr(params, name).astype("float32"))) == pytest.approx(fan_in**-0.5, rel=0.01)
    assert not jnp.array_equal(params.gate_proj, params.up_proj)
    assert not any(jnp.any(bias) for bias in (params.gate_bias, params.up_bias, params.down_bias))


@pytest.mark.needs_cpu
def test_a_single_bfloat16_token_goes_through_two_rows():
    """XLA's CPU backend multiplies one row of bfloat16 on a path that is ten times slower."""
    params, x = samples.mlp_params(case(())[0], "bfloat16"), jnp.ones((1, EMBED_DIM), "bfloat16")
    text = jax.jit(feed_forward).lower(params, x).compile().as_text()
    assert f"[2,{HIDDEN_DIM}]" in text and f" f32[1,{HIDDEN_DIM}]{{1,0}} dot(" not in text


def lowered(platform, tokens):
    params = samples.mlp_params(case(())[0], "bfloat16")
    function = jax.jit(functools.partial(feed_forward, save="autodiff"))
    x = jnp.ones((tokens, EMBED_DIM), "bfloat16")
    return function.trace(params, x).lower(lowering_platforms=(platform,)).as_text()


def test_autodiff_takes_a_cpus_forms_on_a_cpu_only():
    """One row is padded to two on a CPU. Many tokens stay whole everywhere, since a gradient may follow."""
    assert "stablehlo.pad" in lowered("cpu", 1)
    assert "stablehlo.pad" not in lowered("tpu", 1)
    assert all("stablehlo.while" not in lowered(platform, 1024) for platform in ("cpu", "tpu"))
