"""Quantised and adapted weights against the float64 oracle; what has no gradient; what is refused."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import (
    ACTIVATIONS,
    LoRAWeight,
    MLPConfig,
    MLPParams,
    QuantizedWeight,
    checks,
    feed_forward,
    hidden_activations,
    mlp,
)
from gemma_mlp.op import matmuls, xla
from gemma_mlp.op.backend import Op
from gemma_mlp.testing import oracle
from gemma_mlp.testing.oracle import relative_error
from gemma_mlp.weights import dense, require_sound
from tests.support import weights
from tests.support.cases import EMBED_DIM, FLOAT32_BOUND, FLOOR_FACTOR, HIDDEN_DIM, SAVES, case
from tests.support.vary import slow, vary

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CHUNKS = (None, 2)


def run(params, x, dy, dtype, **options):
    """{name: value} of y, dx and all gradients that exist."""
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)

    def apply(leaves, x):
        return feed_forward(weights.put(params, leaves), x, **options)

    @jax.jit
    def value_and_gradients(leaves, x, dy):
        y, pull_back = jax.vjp(apply, leaves, x)
        return y, *pull_back(dy)

    y, gradients, dx = value_and_gradients(weights.trainable(params), x, dy)
    return gradients | {"y": y, "dx": dx}


def assert_errors(result, exact, bounds):
    assert set(result) == set(exact)
    for name, value in result.items():
        assert relative_error(value, exact[name]) <= bounds[name], name


@vary(
    "kind activation save chunk_size",
    [
        *itertools.product(weights.KINDS, sorted(ACTIVATIONS), (*SAVES, "autodiff"), CHUNKS[:1]),
        *itertools.product(weights.KINDS, ("gelu_tanh",), (*SAVES, "autodiff"), CHUNKS[1:]),  # a chunk is a call
    ],
)
def test_float32_equals_the_oracle(kind, activation, save, chunk_size):
    arrays, x, dy = case((2, 3), use_bias=activation == "silu")
    parts, effective = weights.make(arrays, kind)
    exact = weights.exact_result(parts, effective, x, dy, activation)
    params = weights.params(arrays, parts, kind, "float32")
    result = run(params, x, dy, "float32", activation=activation, save=save, chunk_size=chunk_size)
    assert_errors(result, exact, dict.fromkeys(exact, FLOAT32_BOUND))


@pytest.mark.parametrize(("kind", "chunk_size"), [("adapter", None), ("int4", None), ("adapter", 2)])
def test_the_order_of_a_tpus_gradients_changes_no_number(monkeypatch, kind, chunk_size):
    """A v5p and a 7x compute the gradients in an order (gemma_mlp/op/README.md). int4 weights have none."""
    monkeypatch.setattr(xla, "_in_order", lambda op: True)
    jax.clear_caches()
    arrays, x, dy = case((2, 3), use_bias=True)
    parts, effective = weights.make(arrays, kind)
    exact = weights.exact_result(parts, effective, x, dy, "gelu_tanh")
    result = run(weights.params(arrays, parts, kind, "float32"), x, dy, "float32", chunk_size=chunk_size)
    assert_errors(result, exact, dict.fromkeys(exact, FLOAT32_BOUND))
    jax.clear_caches()


@pytest.mark.parametrize("save", [*SAVES, slow("autodiff")])
def test_groups_in_slices_of_f_equal_the_oracle(save):
    """Two slices of 128, and one of 64. In float32 a CPU takes the path of a TPU."""
    arrays, x, dy = case((2, 3), hidden_dim=320, use_bias=True)
    parts, effective = weights.make(arrays, "int4 groups adapter")
    exact = weights.exact_result(parts, effective, x, dy, "gelu_tanh")
    result = run(weights.params(arrays, parts, "int4 groups adapter", "float32"), x, dy, "float32", save=save)
    assert_errors(result, exact, dict.fromkeys(exact, FLOAT32_BOUND))


@vary("kind save chunk_size", itertools.product(weights.KINDS, SAVES, CHUNKS))
def test_bfloat16_is_at_the_floor(kind, save, chunk_size):
    """The floor of a dense weight, if scales are powers of two. Adapters also store x A and dy B.T, of 16 numbers each:
    with so few their gradients scatter by up to 7 % around the floor."""
    arrays, x, dy = case((2, 33))
    parts, effective = weights.make(arrays, kind, scales_of_two=True)
    exact = weights.exact_result(parts, effective, x, dy, "gelu_tanh")
    saved = oracle.bfloat16 if save == "gate_up" else oracle.exact
    stored = weights.exact_result(parts, effective, x, dy, "gelu_tanh", oracle.bfloat16, saved)
    floor = {name: relative_error(stored[name], exact[name]) for name in exact}
    bounds = {name: (1.1 if "lora" in name else FLOOR_FACTOR) * error for name, error in floor.items()}
    params = weights.params(arrays, parts, kind, "bfloat16")
    result = run(params, x, dy, "bfloat16", save=save, chunk_size=chunk_size)
    assert {value.dtype.name for value in result.values()} == {"bfloat16"}
    assert_errors(result, exact, bounds)


@pytest.mark.parametrize("kind", ["int8", "int4 groups", "float8 groups adapter"])
def test_any_scales_cost_bfloat16_one_rounding_more(kind):
    """Of dy times the scales (1.38 times the floor), or of the dequantised groups (1.42 to 1.55)."""
    arrays, x, dy = case((2, 33))
    parts, effective = weights.make(arrays, kind)
    for part in parts.values():
        part["scale"] = oracle.bfloat16(part["scale"])
    effective = {name: oracle.dequantized(part["qvalue"], part["scale"]) for name, part in parts.items()}
    if "adapter" in kind:
        for name, part in parts.items():
            effective[name] = oracle.adapted(effective[name], part["lora_a"], part["lora_b"], weights.FACTOR)
    exact = weights.exact_result(parts, effective, x, dy, "gelu_tanh")
    stored = weights.exact_result(parts, effective, x, dy, "gelu_tanh", oracle.bfloat16)
    bounds = {name: 1.6 * relative_error(stored[name], exact[name]) for name in exact}
    assert_errors(run(weights.params(arrays, parts, kind, "bfloat16"), x, dy, "bfloat16"), exact, bounds)


@pytest.mark.parametrize("kind", ["adapter", "int4"])
def test_hidden_activations(kind):
    arrays, x, _ = case((2, 3))
    parts, effective = weights.make(arrays, kind)
    params = weights.params(arrays, parts, kind, "float32")
    h = hidden_activations(params, jnp.asarray(x, "float32"))
    assert relative_error(h, oracle.mlp(effective, x, "gelu_tanh")[1][-1]) <= FLOAT32_BOUND


def test_int4_in_bytes_has_the_numbers_of_int4():
    """What a GPU takes slices of; the result of a matmul by it, too."""
    qvalue = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (32, 384)), "int4")
    pairs = jax.lax.bitcast_convert_type(qvalue.reshape(32, -1, 2), "int8")
    np.testing.assert_array_equal(matmuls._int4_slice(pairs, 128, 256), qvalue[:, 128:].astype("int8"))
    op = Op(MLPConfig(32, 384), jnp.dtype("float32"))
    weight = QuantizedWeight(qvalue, jnp.asarray(np.random.default_rng(1).uniform(1, 2, (2, 384)), "float32"))

    def multiply(qvalue, scale):
        return x @ dense(QuantizedWeight(qvalue, scale))

    x = jnp.ones((3, 32))
    sliced = [matmuls._in_slices(op, "float32", x, weight, False, multiply, in_bytes) for in_bytes in (False, True)]
    np.testing.assert_array_equal(sliced[1], sliced[0])
    assert relative_error(sliced[0], np.asarray(multiply(weight.qvalue, weight.scale), np.float64)) <= FLOAT32_BOUND


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "int4 groups"])
def test_a_cpu_dequantises_an_eighth_at_once(kind, transpose):
    """Of 1,024 columns or rows 128: the only array of bfloat16 with the size of a slice of the weight, or more."""
    arrays, _, _ = case((1,), embed_dim=1024, hidden_dim=1024)
    weight = weights.params(arrays, weights.make(arrays, kind)[0], kind, "bfloat16").gate_proj
    op = Op(MLPConfig(1024, 1024), jnp.dtype("bfloat16"), on_cpu=True, round_between=False)
    multiply = functools.partial(matmuls.matmul, op, jnp.float32, transpose=transpose)
    text = jax.jit(multiply).lower(jnp.ones((2, 1024), "bfloat16"), weight).as_text()
    slice_type = "128x1024xbf16" if transpose else "1024x128xbf16"
    assert slice_type in text and "1024x1024xbf16" not in text


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_the_arrays_of_a_weight_fit_together_in_stacks_too(lead):
    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct((*lead, *shape), dtype)

    base = QuantizedWeight(array(8, 6, dtype="int8"), array(2, 6))
    require_sound("up_proj", LoRAWeight(base, array(8, 2), array(2, 6), 1.0))
    for a, b in [((6, 2), (2, 6)), ((8, 2), (2, 8)), ((8, 3), (2, 6))]:
        with pytest.raises(ValueError, match=r"lora_a \[8, rank\] and lora_b \[rank, 6\]"):
            require_sound("up_proj", LoRAWeight(base, array(*a), array(*b), 1.0))
    for scale in [(3, 6), (2, 8), (0, 6)]:
        with pytest.raises(ValueError, match="scale"):
            require_sound("up_proj", QuantizedWeight(base.qvalue, array(*scale)))


class TestFrozen:
    """Quantised weights have no gradient. Nobody gets zeros for one."""

    def call(self, save="input", kind="float8 groups adapter"):
        arrays, x, _ = case((2, 3))
        params = weights.params(arrays, weights.make(arrays, kind)[0], kind, "float32")
        return params, lambda params: feed_forward(params, jnp.asarray(x, "float32"), save=save).sum()

    @pytest.mark.parametrize("save", [*SAVES, "autodiff"])
    def test_a_derivative_is_refused(self, save):
        params, loss = self.call(save)
        with pytest.raises(ValueError, match=r"Quantised weights are frozen.*a derivative with respect to.*Fix: "):
            jax.jit(jax.grad(loss))(params)

    def test_so_is_one_of_the_hidden_activations(self):
        params, _ = self.call()
        with pytest.raises(ValueError, match="Quantised weights are frozen"):
            jax.grad(lambda params: hidden_activations(params, jnp.ones((2, EMBED_DIM))).sum())(params)

    def test_jax_refuses_integers(self):
        params, loss = self.call(kind="int4")
        with pytest.raises(TypeError, match="int4"):
            jax.grad(loss)(params)

    @pytest.mark.parametrize("save", ["input", slow("gate_up"), slow("autodiff")])
    def test_checks_of_values_ask_for_no_more(self, save):
        params, loss = self.call(save, kind="int4 groups adapter")
        leaves = weights.trainable(params)
        gradient = jax.grad(lambda leaves: loss(weights.put(params, leaves)))
        checked = checks.check_values(gradient)(leaves)
        for name, expected in gradient(leaves).items():
            assert relative_error(checked[name], np.asarray(expected, np.float64)) <= FLOAT32_BOUND
        broken = leaves | {"up_proj lora_b": leaves["up_proj lora_b"].at[0, 0].set(np.nan)}
        with pytest.raises(AssertionError, match="params"):
            checks.check_values(gradient)(broken)


@pytest.mark.parametrize("chunk_size", [None, 128])
@pytest.mark.parametrize(("save", "matmuls"), [("input", 8), ("gate_up", 6)])
@pytest.mark.parametrize("kind", ["adapter", "int8", "int4 groups adapter"])
def test_a_frozen_base_has_no_gradient_to_compute(kind, save, matmuls, chunk_size):
    """8 matmuls of full size instead of 11, and 6 instead of 9."""
    tokens, embed_dim, hidden_dim = 256, 384, 1024
    arrays, x, dy = case((tokens,), embed_dim=embed_dim, hidden_dim=hidden_dim)
    params = weights.params(arrays, weights.make(arrays, kind)[0], kind, "bfloat16")
    adapters = {name: leaf for name, leaf in weights.trainable(params).items() if "lora" in name}

    def gradient(params, adapters, x, dy):
        def apply(adapters, x):
            return feed_forward(weights.put(params, adapters), x, save=save, chunk_size=chunk_size)

        y, pull_back = jax.vjp(apply, adapters, x)
        return y, pull_back(dy)

    traced = jax.jit(gradient).trace(params, adapters, jnp.asarray(x, "bfloat16"), jnp.asarray(dy, "bfloat16"))
    dots = re.findall(r"stablehlo.dot_general.*", traced.lower(lowering_platforms=("tpu",)).as_text())
    full_size = [dot for dot in dots if f"tensor<{weights.RANK}x" not in dot and f"x{weights.RANK}x" not in dot]
    assert len(full_size) == matmuls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: dataclasses.replace(w, qvalue=w.qvalue.astype("int16")), "qvalue dtype must be one of int8, int4"),
        (lambda w: dataclasses.replace(w, scale=w.scale[:, :-1]), r"scale must be \[groups, out\]"),
        (lambda w: dataclasses.replace(w, scale=jnp.ones((3, HIDDEN_DIM))), r"scale must be \[groups, out\]"),
        (lambda w: dataclasses.replace(w, scale=w.scale[0]), r"scale must be \[groups, out\]"),
        (lambda w: dataclasses.replace(w, scale=w.scale.astype("float16")), r"scale must be \[groups, out\]"),
        (lambda w: LoRAWeight(w, jnp.ones((EMBED_DIM, 2)), jnp.ones((3, HIDDEN_DIM))), r"lora_a \[64, rank\]"),
        (lambda w: LoRAWeight(w, jnp.ones((EMBED_DIM + 1, 2)), jnp.ones((2, HIDDEN_DIM))), r"lora_a \[64, rank\]"),
        (lambda w: LoRAWeight(w, jnp.ones((2, EMBED_DIM)), jnp.ones((2, HIDDEN_DIM))), r"lora_a \[64, rank\]"),
        (lambda w: LoRAWeight(w, jnp.ones((EMBED_DIM, 2), "int8"), jnp.ones((2, HIDDEN_DIM))), r"lora_a \[64, rank\]"),
        (lambda w: LoRAWeight(LoRAWeight(w, *ab()), *ab()), "can have one adapter"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    arrays, x, _ = case((2, 3))
    params = weights.params(arrays, weights.make(arrays, "int8")[0], "int8", "float32")
    params = dataclasses.replace(params, gate_proj=change(params.gate_proj))
    with pytest.raises(ValueError, match=message + r".* Got: .* Fix: "):
        feed_forward(params, jnp.asarray(x, "float32"))


def ab():
    return jnp.ones((EMBED_DIM, 2)), jnp.ones((2, HIDDEN_DIM))


def test_weights_of_another_size_are_refused():
    arrays, x, _ = case((2, 3))
    params = weights.params(arrays, weights.make(arrays, "int4")[0], "int4", "float32")
    with pytest.raises(ValueError, match=r"x must be \[\*B, D\].*float32\[64, 256\]"):
        feed_forward(dataclasses.replace(params, down_proj=params.up_proj), jnp.asarray(x, "float32"))


def test_kernels_refuse_them():
    config = MLPConfig(EMBED_DIM, HIDDEN_DIM, implementation="pallas", weight_dtype="int8")
    params = MLPParams.init(config, jax.random.key(0))
    with pytest.raises(ValueError, match="implementation='pallas'"):
        mlp(params, jnp.ones((2, EMBED_DIM)), config)


@pytest.mark.parametrize("kind", ["int8", "int4 groups adapter"])
def test_under_vmap_scan_remat_and_export(kind):
    """Two layers, stacked, give what they give one after the other."""
    arrays, x, _ = case((2, 3))
    layers = [weights.params(arrays, weights.make(arrays, kind, seed=s)[0], kind, "float32") for s in (1, 2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = jnp.asarray(x, "float32")
    one_by_one = functools.reduce(lambda x, params: x + feed_forward(params, x), layers, x)

    def scanned(stack, x):
        layer = jax.checkpoint(lambda x, params: (x + feed_forward(params, x), None))
        return jax.lax.scan(layer, x, stack)[0]

    exported = jax.export.export(jax.jit(scanned))(stack, x)
    again = jax.export.deserialize(exported.serialize())
    for y in (scanned(stack, x), jax.jit(scanned)(stack, x), again.call(stack, x)):
        assert relative_error(y, np.asarray(one_by_one, np.float64)) <= FLOAT32_BOUND
    experts = jax.vmap(feed_forward, (0, None))(stack, x)
    for y, params in zip(experts, layers):
        assert relative_error(y, np.asarray(feed_forward(params, x), np.float64)) <= FLOAT32_BOUND


def test_fields_are_those_of_the_formula():
    """W = qvalue * scale, in groups along the first axis; W = base + factor * A B."""
    qvalue, scale = jnp.arange(-4, 4).reshape(4, 2).astype("int4"), jnp.array([[1.0, 2.0], [10.0, 20.0]])
    weight = QuantizedWeight(qvalue, scale)
    assert (weight.shape, weight.ndim, weight.dtype, weight.group_size) == ((4, 2), 2, jnp.float32, 2)
    gate = jnp.array([[1.0, 0, 0, 0], [0, 1, 0, 0]])  # with up, h = [x1^2, x2^2, x1 x2, x2^2]
    up = jnp.array([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    params = MLPParams(gate.at[0, 2].set(1.0).at[1, 3].set(1.0), up.at[1, 2].set(1.0).at[1, 3].set(1.0), weight)
    x = jnp.array([2.0, 3.0])
    h = [4.0, 9.0, 6.0, 9.0]
    values = [[-4, -6], [-2, -2], [0, 20], [20, 60]]  # [[-4, -3], [-2, -1], [0, 1], [2, 3]] times the scales
    y = feed_forward(params, x, activation="identity")
    np.testing.assert_allclose(y, np.array(h) @ np.array(values), rtol=1e-6)
    a, b = jnp.array([[1.0], [0.0], [0.0], [2.0]]), jnp.array([[3.0, 5.0]])
    adapted = dataclasses.replace(params, down_proj=LoRAWeight(weight, a, b, 0.5))
    delta = feed_forward(adapted, x, activation="identity") - y
    np.testing.assert_allclose(delta, 0.5 * (4.0 + 2 * 9.0) * np.array([3, 5]), rtol=1e-6)
