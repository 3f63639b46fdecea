"""In float32 the block exports to ONNX, by jax2onnx, and onnxruntime computes the same.

In bfloat16 it does not: the program has a branch for CPUs, and onnxruntime multiplies no bfloat16 on a CPU.
"""

import contextlib

import jax
import numpy as np
import pytest
from flax import nnx

import gemma_mlp
from gemma_mlp import MLPConfig
from gemma_mlp.testing.oracle import relative_error

with contextlib.suppress(ModuleNotFoundError):
    import jax2onnx
    import onnxruntime

pytestmark = [pytest.mark.needs_onnx, pytest.mark.promotes, pytest.mark.filterwarnings("ignore")]

D, F = 8, 16


def nnx_module(kind, config):
    return getattr(gemma_mlp.nnx, kind)(config, rngs=nnx.Rngs(0))


def linen_module(kind, config):
    module = getattr(gemma_mlp.linen, kind)(config)
    variables = module.init(jax.random.key(0), np.zeros((1, D), "float32"))
    return lambda x: module.apply(variables, x)


OPTIONS = (*({"save": save} for save in ("input", "gate_up", "autodiff")), {"use_bias": True}, {"post_norm": False})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["MLP", "MLPBlock"])
@pytest.mark.parametrize("shell", [nnx_module, linen_module])
def test_onnxruntime_computes_the_same(shell, kind, options):
    module = shell(kind, MLPConfig(D, F, **options))
    model = jax2onnx.to_onnx(lambda x: module(x), inputs=[("B", 4, D)])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 4, D)).astype("float32")
        (y,) = session.run(None, {session.get_inputs()[0].name: x})
        assert relative_error(y, np.asarray(module(x), np.float64)) <= 1e-6


@pytest.mark.parametrize("options", [{"chunk_size": 600}, {"save": "autodiff"}], ids=str)
def test_more_than_512_tokens_of_a_fixed_length(options):
    """By default a CPU takes them in chunks, and then the program has a branch for CPUs."""
    module, x = nnx_module("MLP", MLPConfig(D, F, **options)), np.random.default_rng(0).standard_normal((600, D))
    expected = np.asarray(module(x.astype("float32")), np.float64)
    model = jax2onnx.to_onnx(lambda x: module(x), inputs=[x.shape])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.astype("float32")})
    assert relative_error(y, expected) <= 1e-6
