"""The parts of a block may be replaced by other modules, and probes see the parts that a reader expects."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import gemma_mlp
from gemma_mlp import MLPConfig
from gemma_mlp.testing.oracle import relative_error

pytestmark = [pytest.mark.usefixtures("quick_to_compile"), pytest.mark.promotes]  # Flax's own modules rely on it

D, F = 16, 256
CONFIG = MLPConfig(D, F)
BOUND = 1e-6
X = jax.random.normal(jax.random.key(9), (2, 5, D))


def make_block(config=CONFIG, seed=0):
    block = gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(seed))
    for i, norm in enumerate((block.pre_norm, block.post_norm)):
        norm.scale.set_value(0.3 * jax.random.normal(jax.random.key(seed + i), (D,), config.param_dtype))
    return block


def close(got, expected):
    bound = BOUND if got.dtype == jnp.float32 else 3e-4  # some numbers in bfloat16 are rounded the other way
    return got.dtype == expected.dtype and relative_error(got, np.asarray(expected, np.float64)) <= bound


class Tanh(nnx.Module):
    """A norm that no block knows."""

    def __init__(self, rngs):
        self.factor = nnx.Param(jnp.full((D,), 0.7))

    def __call__(self, x):
        return jnp.tanh(x) * self.factor[...]


class Halved(gemma_mlp.nnx.RMSNorm):
    """Has a scale, and does something else with it."""

    def __call__(self, x):
        return super().__call__(x) / 2


class TestNorms:
    @pytest.mark.parametrize(
        "kind", [Tanh, lambda rngs: Halved(CONFIG, rngs=rngs), lambda rngs: nnx.LayerNorm(D, rngs=rngs)]
    )
    @pytest.mark.parametrize("which", [("pre_norm",), ("post_norm",), ("pre_norm", "post_norm")], ids="+".join)
    def test_a_replaced_norm_is_called(self, which, kind):
        block = make_block()
        for name in which:
            setattr(block, name, kind(nnx.Rngs(0)))

        def by_hand(block, x):
            return x + block.post_norm(block.mlp(block.pre_norm(x)))

        assert close(block(X), by_hand(block, X))
        got, expected = (nnx.grad(lambda b, x: jnp.sin(f(b, x)).sum())(block, X) for f in (lambda b, x: b(x), by_hand))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert close(a, b) and jnp.any(b != 0)

    def test_one_may_be_a_function_or_missing(self):
        block = make_block()
        block.pre_norm, block.post_norm = jnp.tanh, None
        assert close(block(X), X + block.mlp(jnp.tanh(X)))

    def test_the_sum_is_float32_and_the_result_has_the_dtype_of_x(self):
        config = dataclasses.replace(CONFIG, dtype="bfloat16")
        block, x = make_block(config), X.astype(jnp.bfloat16)
        expected = block(x)
        block.pre_norm, block.post_norm = Called(block.pre_norm), Called(block.post_norm)
        y = block(x)
        assert y.dtype == jnp.bfloat16
        assert relative_error(y, np.asarray(expected, np.float64)) < 0.003

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_capture_sees_all_parts_and_the_numbers_stay(self, dtype):
        block = make_block(dataclasses.replace(CONFIG, dtype=dtype))
        x = X.astype(dtype or "float32")
        y, captured = nnx.capture(block, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
        captured = nnx.to_pure_dict(captured)
        assert close(y, block(x))
        assert (captured["pre_norm"]["__call__"][0] == block.pre_norm(x)).all()
        assert captured["post_norm"]["__call__"][0].shape == captured["mlp"]["__call__"][0].shape == x.shape

    def test_untouched_norms_are_part_of_our_program(self):
        """It saves x in its own dtype, and recomputes the norms."""
        block = make_block(dataclasses.replace(CONFIG, dtype="bfloat16"))
        graphdef, state = nnx.split(block)
        program = str(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, X.astype(jnp.bfloat16)))
        assert "name=_before" in program and "name=_after" in program


class Called(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


class TestMLP:
    def test_lora_around_it(self):
        block = make_block()
        y, mlp = block(X), block.mlp
        block.mlp = nnx.LoRA(D, 2, D, base_module=mlp, rngs=nnx.Rngs(1))
        assert close(block(X), y)
        assert close(block(X, deterministic=True), y)
        block.mlp.lora_b.set_value(jnp.ones((2, D)))
        normed = block.pre_norm(X)
        delta = normed @ block.mlp.lora_a[...] @ block.mlp.lora_b[...]
        assert close(block(X), X + block.post_norm(mlp(normed) + delta))

    def test_anybodys_mlp(self):
        block = make_block()
        block.mlp = nnx.Sequential(nnx.Linear(D, F, rngs=nnx.Rngs(0)), nnx.gelu, nnx.Linear(F, D, rngs=nnx.Rngs(1)))
        assert close(block(X), X + block.post_norm(block.mlp(block.pre_norm(X))))


class TestProjections:
    SIZES = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}

    def linear(self, mlp, name, kind=nnx.Linear, **options):
        linear = kind(*self.SIZES[name], use_bias=False, rngs=nnx.Rngs(3), **options)
        linear.kernel.set_value(getattr(mlp, name)[...])
        return linear

    @pytest.mark.parametrize("use_bias", [False, True])
    @pytest.mark.parametrize("names", [("up_proj",), tuple(SIZES)], ids="+".join)
    def test_a_replaced_projection_is_called(self, names, use_bias):
        config = dataclasses.replace(CONFIG, use_bias=use_bias)
        mlp = gemma_mlp.nnx.MLP(config, rngs=nnx.Rngs(0))
        if use_bias:
            for name in ("gate_bias", "up_bias", "down_bias"):
                getattr(mlp, name).set_value(jax.random.normal(jax.random.key(5), getattr(mlp, name).shape))
        y = mlp(X)
        for name in names:
            setattr(mlp, name, self.linear(mlp, name))
        assert close(mlp(X), y)
        mlp.up_proj.kernel.set_value(jnp.zeros((D, F)))
        assert not close(mlp(X), y)

    @pytest.mark.parametrize("name", list(SIZES))
    def test_lora_on_a_projection(self, name):
        mlp = gemma_mlp.nnx.MLP(CONFIG, rngs=nnx.Rngs(0))
        init = nnx.initializers.normal()
        lora = self.linear(mlp, name, nnx.LoRALinear, lora_rank=2, b_initializer=init)
        merged = getattr(mlp, name)[...] + lora.lora.lora_a[...] @ lora.lora.lora_b[...]
        merged = gemma_mlp.MLPParams(**{n: merged if n == name else getattr(mlp, n)[...] for n in self.SIZES})
        setattr(mlp, name, lora)
        assert close(mlp(X), gemma_mlp.mlp(merged, X, CONFIG))
        grads = nnx.grad(lambda mlp: jnp.sin(mlp(X)).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(mlp)
        assert len(jax.tree.leaves(grads)) == 2 and all((leaf != 0).any() for leaf in jax.tree.leaves(grads))

    def test_dropout_draws_the_same_mask(self):
        mlp = gemma_mlp.nnx.MLP(dataclasses.replace(CONFIG, dropout_rate=0.5), rngs=nnx.Rngs(0))
        y = mlp(X, rngs=nnx.Rngs(dropout=7))
        _, captured = nnx.capture(lambda mlp, x: mlp(x, rngs=nnx.Rngs(dropout=7)), nnx.Intermediate)(mlp, X)
        mlp.down_proj = self.linear(mlp, "down_proj")
        assert close(mlp(X, rngs=nnx.Rngs(dropout=7)), y)
        _, again = nnx.capture(lambda mlp, x: mlp(x, rngs=nnx.Rngs(dropout=7)), nnx.Intermediate)(mlp, X)
        assert close(nnx.to_pure_dict(again)["hidden"][0], nnx.to_pure_dict(captured)["hidden"][0])


class LinenTanh(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(x) * self.param("factor", nn.initializers.constant(0.7), (D,))


class LinenWidened(gemma_mlp.linen.MLPBlock):
    """A block with other parts."""

    def setup(self):
        self.pre_norm, self.post_norm = LinenTanh(), gemma_mlp.linen.RMSNorm(self.config)
        self.mlp = nn.Dense(D)


class TestLinen:
    def test_a_subclass_replaces_parts(self):
        block = LinenWidened(CONFIG)
        variables = nn.unbox(block.init(jax.random.key(0), X))
        params = variables["params"]
        assert set(params) == {"pre_norm", "mlp", "post_norm"} and set(params["pre_norm"]) == {"factor"}
        y = nn.Dense(D).apply({"params": params["mlp"]}, jnp.tanh(X) * params["pre_norm"]["factor"])
        assert close(block.apply(variables, X), X + gemma_mlp.rms_norm(params["post_norm"]["scale"], y))

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_interceptors_and_captures_see_the_norms_and_the_numbers_stay(self, dtype):
        block = gemma_mlp.linen.MLPBlock(dataclasses.replace(CONFIG, dtype=dtype))
        x = X.astype(dtype or "float32")
        variables = block.init(jax.random.key(0), x)
        seen = []

        def look(next_function, args, kwargs, context):
            if context.method_name == "__call__":
                seen.append(context.module.name)
            return next_function(*args, **kwargs)

        expected = block.apply(variables, x)
        with nn.intercept_methods(look):
            assert close(block.apply(variables, x), expected)
        assert seen == [None, "pre_norm", "mlp", "post_norm"]
        y, state = block.apply(variables, x, capture_intermediates=True)
        assert close(y, expected)
        assert {"pre_norm", "mlp", "post_norm", "__call__"} <= set(state["intermediates"])

    def test_what_an_interceptor_returns_counts(self):
        block = gemma_mlp.linen.MLPBlock(CONFIG)
        variables = block.init(jax.random.key(0), X)

        def without_the_branch(next_function, args, kwargs, context):
            y = next_function(*args, **kwargs)
            return 0 * y if (context.module.name, context.method_name) == ("post_norm", "__call__") else y

        with nn.intercept_methods(without_the_branch):
            assert (block.apply(variables, X) == X).all()
