"""The choice of the backend: the one place that knows the kernels' platforms by name."""

from typing import Any

import jax.numpy as jnp

from gemma_mlp.checks import describe, require
from gemma_mlp.config import MLPConfig
from gemma_mlp.mesh import mesh_to_split, target_device, varying_axes
from gemma_mlp.op.backend import XLA, Backend
from gemma_mlp.op.gpu import GPU
from gemma_mlp.op.tpu import TPU
from gemma_mlp.params import MLPParams

KERNELS = {"tpu": TPU, "gpu": GPU, "cuda": GPU}  # by JAX's names of platforms


def choose_backend(config: MLPConfig, params: MLPParams, x: Any, dtype: Any, dropout_rate: float) -> Backend:
    """XLA's, or with `implementation="pallas"` the kernels of the device that the program is compiled for.

    It raises a ValueError if the device has no kernels, or they do not serve the case.
    """
    if config.implementation != "pallas":
        return XLA
    platform = target_device().platform
    _require(
        platform in KERNELS,
        "needs a TPU or an NVIDIA GPU",
        f"a program for {platform}",
        "to compile ahead of time for another platform, call jax.set_mesh with a mesh of its devices",
    )
    backend = KERNELS[platform]
    known = all(isinstance(size, int) for size in x.shape)
    _require(known, "needs sizes that are known when the program is traced", f"x {describe(x)}")
    axes = ", ".join(sorted(varying_axes((params, x))))
    fix = "pass check_vma=False to jax.shard_map, or use implementation='xla'"
    _require(not axes, "needs check_vma=False inside a jax.shard_map", f"arrays that vary over {axes}", fix)
    _require(dtype != jnp.float64, "needs bfloat16 or, on a TPU, float32", "float64")
    lacking = f"activation {config.activation!r} on a {platform}"
    _require(config.activation not in backend.lacks, "needs an activation that its kernels have", lacking)
    _require(dropout_rate == 0, "has no dropout", f"dropout_rate {dropout_rate}")
    _require(params.gate_bias is None, "has no biases, as Gemma has none", "biases")
    _require(
        mesh_to_split() is None or config.axis_rules is not None,
        "needs axis_rules on a mesh of several devices",
        "axis_rules None",
        "gemma_mlp.sharding.RULES is an example",
    )
    return backend


def _require(condition, rule, received, fix="use implementation='xla'"):
    require(condition, f"implementation='pallas' {rule}.", received, f"{fix}.")
