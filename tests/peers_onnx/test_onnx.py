"""With `save="autodiff"` the block exports to ONNX, by jax2onnx, and onnxruntime computes the same.

The other values of `save` have a derivative of their own and a branch for CPUs, which jax2onnx does not know.
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


@pytest.mark.parametrize("options", [{}, {"use_bias": True}, {"activation": "silu"}, {"post_norm": False}], ids=str)
@pytest.mark.parametrize("kind", ["MLP", "MLPBlock"])
@pytest.mark.parametrize("shell", [nnx_module, linen_module])
def test_onnxruntime_computes_the_same(shell, kind, options):
    module = shell(kind, MLPConfig(D, F, save="autodiff", **options))
    model = jax2onnx.to_onnx(lambda x: module(x), inputs=[("B", 4, D)])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 4, D)).astype("float32")
        (y,) = session.run(None, {session.get_inputs()[0].name: x})
        assert relative_error(y, np.asarray(module(x), np.float64)) <= 1e-6
