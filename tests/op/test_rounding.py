"""On a TPU float32 weights are rounded before they are cast to bfloat16. The numbers are those of the cast."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from gemma_mlp import MLPConfig
from gemma_mlp.op import matmuls
from gemma_mlp.op.backend import Op


def test_rounding_before_the_cast_gives_the_numbers_of_the_cast(monkeypatch):
    """For random bits and around every bfloat16: also halfway cases, subnormal numbers, infinities and NaN."""
    monkeypatch.setattr(matmuls, "target_device", lambda: SimpleNamespace(device_kind="TPU v5 lite"))
    random = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    ties = np.arange(0, 2**32, 2**15, dtype=np.uint64).astype(np.uint32)
    weight = np.concatenate([random, ties, ties - 1, ties + 1]).view(np.float32)
    op = Op(MLPConfig(8, 16), jnp.dtype("bfloat16"))
    rounded = np.asarray(jax.jit(lambda weight: matmuls._rounded_on_tpu(op, weight))(weight))
    cast = np.asarray(jax.jit(lambda weight: weight.astype("bfloat16").astype("float32"))(weight))
    finite = ~np.isnan(weight)
    assert rounded.dtype == np.float32 and (rounded.view(np.uint32)[finite] == cast.view(np.uint32)[finite]).all()
    assert np.isnan(rounded[~finite]).all()
