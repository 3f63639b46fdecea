"""Shardings over a mesh for all that a training step holds: parameters of either shell, optimizer state, activations.

    mesh = jax.make_mesh((1, 2, 4), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    config = dataclasses.replace(config, axis_rules=sharding.RULES)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.named_shardings(MLPBlockParams.specs(config), mesh))
        y = jax.jit(mlp_block, static_argnums=2)(params, x, config)

Meshes of automatic and of explicit axes (`jax.sharding.AxisType`) both work.
"""

from typing import Any

import jax
import optax
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_mlp.checks import require
from gemma_mlp.mesh import (
    RULES,
    SEQUENCE_PARALLEL_RULES,
    Rules,
    activation_spec,
    partition_spec,
    require_divisible,
    require_rules,
)
from gemma_mlp.params import LeafSpec

__all__ = ["RULES", "SEQUENCE_PARALLEL_RULES", "Rules", "activation_sharding", "named_shardings", "optimizer_shardings"]

BOXES = (nnx.Variable, nn.Partitioned, LeafSpec)  # what carries logical axes


def named_shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A sharding for every leaf of `tree`, in a tree of the same structure.

    Args:
      tree: arrays, or `jax.ShapeDtypeStruct`s, with their logical axes: an `nnx.State` of a model or of an
        `nnx.Optimizer`, Linen's variables or a train state of them as `init` gives them, boxed, or
        `MLPBlockParams.specs(config)`. What among them has no logical axes is put whole on every device.
      mesh: the devices.
      rules: which mesh axes each logical axis is split over.

    Raises:
      ValueError: if an axis does not divide, the mesh has no such axis, a logical axis has no rule, or nothing in the
        tree has logical axes.
    """
    require_rules(rules)

    def is_box(leaf):
        return isinstance(leaf, BOXES)

    require(
        any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box))),
        "Shardings follow from logical axes.",
        "a tree of arrays alone",
        "give MLPBlockParams.specs(config), nnx.state(model), or Linen's variables before nn.unbox.",
    )

    def sharding(axes, shape):
        spec = partition_spec(axes, rules)
        require_divisible("a parameter", shape, spec, mesh, rules)
        return NamedSharding(mesh, spec)

    def of_leaf(leaf):
        if isinstance(leaf, LeafSpec):
            return sharding(leaf.axes, leaf.shape)
        if isinstance(leaf, nnx.Variable):
            axes = leaf.get_metadata().get("out_sharding") or ()
            return leaf.replace(sharding(axes, leaf.get_value().shape))
        if isinstance(leaf, nn.Partitioned):
            return leaf.replace_boxed(sharding(leaf.names, leaf.value.shape))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of_leaf, tree, is_leaf=is_box)


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of `optimizer.init(params)`: what goes with a parameter is split as it is.

    Args:
      optimizer: any of optax.
      params: the parameters, or their `jax.ShapeDtypeStruct`s.
      shardings: of the parameters, in a tree of the same structure.
      mesh: the devices; what does not go with a parameter is put whole on each.
    """
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def activation_sharding(shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """How the residual stream [*B, D] is split between blocks, its first axis being `batch`, the second last `length`.

    Raises:
      ValueError: as :func:`named_shardings`.
    """
    require_rules(rules)
    return NamedSharding(mesh, activation_spec(shape, None, mesh, rules))
