"""What a call does before any arithmetic: it takes what JAX takes, explains what it refuses, and is traced once."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gemma_mlp
from gemma_mlp import MLPBlockParams, MLPConfig, MLPParams, feed_forward, hidden_activations, mlp, mlp_block, rms_norm
from gemma_mlp.op import api, vjp
from tests.support.vary import vary

CONFIG = MLPConfig(8, 16)
CONFIGS = {None: CONFIG, "bfloat16": MLPConfig(8, 16, dtype="bfloat16")}  # by dtype
BLOCK = MLPBlockParams.init(CONFIG, jax.random.key(0))
X = jnp.linspace(-2, 2, 3 * 8).reshape(3, 8)


def nnx_module(name, config):
    return getattr(gemma_mlp.nnx, name)(config, rngs=nnx.Rngs(0))


def linen_module(name, config):
    module = getattr(gemma_mlp.linen, name)(config)
    return functools.partial(module.apply, module.init(jax.random.key(0), X))


@functools.cache
def calls(config):
    modules = {
        f"{shell}.{name}": make(name, config)
        for shell, make in (("nnx", nnx_module), ("linen", linen_module))
        for name in ("MLP", "RMSNorm", "MLPBlock")
    }
    return modules | {
        "feed_forward": lambda x: feed_forward(BLOCK.mlp, x, dtype=config.dtype),
        "hidden_activations": lambda x: hidden_activations(BLOCK.mlp, x, dtype=config.dtype),
        "mlp": lambda x: mlp(BLOCK.mlp, x, config),
        "mlp_block": lambda x: mlp_block(BLOCK, x, config),
        "rms_norm": lambda x: rms_norm(BLOCK.pre_norm.scale, x, dtype=config.dtype),
    }


@vary(
    "name dtype jit wrong",
    itertools.product(calls(CONFIG), CONFIGS, (False, True), ("float16", "int32", "bool", "float8_e4m3fn")),
    together="name dtype",
)
def test_every_call_refuses_a_wrong_dtype_alike(name, dtype, jit, wrong):
    call = calls(CONFIGS[dtype])[name]
    call = jax.jit(call) if jit else call
    with pytest.raises(ValueError, match=rf"x must be an array of bfloat16, float32, float64.*{wrong}\[3, 8\]"):
        call(X.astype(wrong))


WRONG = {
    "activation": "swish",
    "dtype": "int8",
    "dropout_rate": 1.5,
    "save": "everything",
    "chunk_size": 0,
    "axis_rules": (("batch", "data"),),
    "implementation": "triton",
}


@pytest.mark.parametrize(
    ("function", "option"),
    [
        (f, name)
        for f in (feed_forward, hidden_activations)
        for name in WRONG
        if name in inspect.signature(f).parameters
    ],
)
def test_every_option_of_the_functions_is_checked(function, option):
    with pytest.raises(ValueError, match=f"{option} must"):
        function(BLOCK.mlp, X, **{option: WRONG[option]})


@pytest.mark.parametrize("name", calls(CONFIG))
def test_a_list_is_refused_alike(name):
    with pytest.raises(ValueError, match=r"x must be an array of bfloat16, float32, float64.*list"):
        calls(CONFIG)[name]([[0.0] * 8])


@pytest.mark.parametrize("name", calls(CONFIG))
@pytest.mark.parametrize("dtype", CONFIGS)
def test_numpys_float64_is_float32_eagerly_as_under_jit(name, dtype):
    """JAX makes float32 of it, unless it is in 64-bit mode."""
    call, x = calls(CONFIGS[dtype])[name], np.asarray(X, np.float64)
    eager, jitted, expected = call(x), jax.jit(call)(x), call(X)
    assert eager.dtype == jitted.dtype == expected.dtype
    assert jnp.array_equal(eager, expected) and jnp.array_equal(jitted, jax.jit(call)(X))


@pytest.mark.parametrize("array", [np.float64, np.float16])
def test_parameters_may_be_numpys_too(array):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, array), BLOCK)
    if array is np.float64:
        assert jnp.array_equal(mlp_block(params, X, CONFIG), mlp_block(BLOCK, X, CONFIG))
    else:
        with pytest.raises(ValueError, match=r"must be an array of bfloat16.*float16"):
            mlp_block(params, X, CONFIG)


def loss(call):
    return lambda params, x: jnp.sum(call(params, x))


def block(params, x):
    return mlp_block(params, x, CONFIG)


def functional(params):
    return jax.grad(loss(block)), params


def module(name):
    def make(params):
        call = nnx.grad(lambda module, x: jnp.sum(module(x)))
        return call, nnx_module(name, CONFIG)

    return make


@pytest.mark.parametrize("make", [functional, module("MLP"), module("MLPBlock")], ids=["mlp_block", "MLP", "MLPBlock"])
def test_an_eager_gradient_is_traced_once(make, monkeypatch):
    traced = []

    def noted(name, function, *args, **options):
        traced.append(name)
        return function(*args, **options)

    for module, name in ((api, "_checked_op"), (vjp.xla, "gradients")):
        monkeypatch.setattr(module, name, functools.partial(noted, name, getattr(module, name)))
    jax.clear_caches()
    gradient, params = make(BLOCK)
    gradient(params, X)
    assert set(traced) == {"_checked_op", "gradients"}
    first = len(traced)
    gradient(params, X)
    gradient(params, 2 * X)
    assert len(traced) == first


@pytest.mark.parametrize("wrapped", [block, jax.checkpoint(block)], ids=["plain", "remat"])
def test_a_model_of_many_layers_has_one_program_for_a_layer(wrapped):
    def lowered(layers):
        def model(layers, x):
            for params in layers:
                x = wrapped(params, x)
            return jnp.sum(x)

        return jax.jit(jax.grad(model)).lower([BLOCK] * layers, X).as_text().count("func.func private")

    assert lowered(3) == lowered(8)  # the first and the last have one of their own


def test_an_eager_call_is_one_program():
    names = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details["fun_name"])

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        mlp_block(BLOCK, X, CONFIG)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert names == ["_mlp_block"] or names == ["jit(_mlp_block)"]


def test_params_of_the_wrong_kind_are_explained():
    with pytest.raises(ValueError, match="MLPParams"):
        mlp(dict(vars(BLOCK.mlp)), X, CONFIG)
    with pytest.raises(ValueError, match="MLPParams"):
        feed_forward(MLPParams, X)
