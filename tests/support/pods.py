"""One layer of Gemma 2 27B in bfloat16, compiled for a pod of TPUs with 8,192 tokens for each row of chips."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_mlp import MLPParams, aot, sharding
from gemma_mlp.testing.stacks import make_config, make_layer, one

POD = "tpu v5e:16x16"
WEIGHT_SHARD = 4608 * 36864 // 16 * 2  # bytes of a weight on one of sixteen columns of chips
SEQUENCE = 8192 * 4608 * 2  # bytes of the sequence of one row of chips


def compile_layer(target, fsdp, tensor, rules, gradient=None, *, layer=None, chunk_size=None, implementation=None):
    """Compiles `layer`, by default ours, or its `gradient`, which is :func:`gradient_of_sum` or `stacks.one`."""
    mesh = Mesh(np.array(aot.devices(target)).reshape(1, fsdp, tensor), ("data", "fsdp", "tensor"))
    config = make_config("gemma2_27b", chunk_size=chunk_size, implementation=implementation)
    config = dataclasses.replace(config, axis_rules=rules)
    layer = layer or make_layer(config)

    specs = MLPParams.specs(config)
    weights = sharding.named_shardings(specs, mesh, rules)
    params = jax.tree.map(
        lambda place, spec: jax.ShapeDtypeStruct(spec.shape, config.param_dtype, sharding=place), weights, specs
    )
    shape = (fsdp, 8192, config.embed_dim)
    sequences = sharding.activation_sharding(shape, mesh, rules)
    x = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sequences)

    def placed_gradient(*args):
        return jax.lax.with_sharding_constraint(gradient(layer)(*args), (weights, sequences))

    with jax.set_mesh(mesh):
        if gradient is None:
            return aot.compile_for(target, layer, params, x)
        return aot.compile_for(target, placed_gradient, params, x, *([x] if gradient is one else []))


def gradient_of_sum(layer):
    """The gradient of the sum of y, a loss in the same program."""
    return jax.grad(lambda params, x: layer(params, x).astype("float32").sum(), argnums=(0, 1))


def gathered_bytes(program):
    """The sizes of the results of a program's all-gathers."""
    return [collective.bytes for collective in program.collectives if collective.kind == "all-gather"]
