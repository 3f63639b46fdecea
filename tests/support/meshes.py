"""Meshes of the eight CPU devices that tests/conftest.py makes, and parameters on them."""

import jax
from jax.sharding import AxisType

from gemma_mlp import sharding

SHAPES = ((8, 1), (4, 2), (2, 4), (1, 8))  # fsdp, tensor
MESHES = (*((shape, AxisType.Auto) for shape in SHAPES), ((2, 4), AxisType.Explicit))
RULES = {"tensor": sharding.RULES, "sequence": sharding.SEQUENCE_PARALLEL_RULES}


def make_mesh(fsdp, tensor, axis_type=AxisType.Auto, data=1):
    shape = (data, fsdp, tensor)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), (axis_type,) * 3, devices=jax.devices("cpu")[:8])


def spread(tree, mesh, rules, specs):
    return jax.device_put(tree, sharding.named_shardings(specs, mesh, rules))
