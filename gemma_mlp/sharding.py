"""Makes shardings over a mesh for parameters (NNX, Linen or functional), optimizer state and activations.

Arrays inside the feed-forward are constrained by `mesh.constrain`, which op/xla.py calls. mesh.py has the rules.

    mesh = jax.make_mesh((1, 2, 4), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    config = dataclasses.replace(config, axis_rules=sharding.RULES)
    shardings = sharding.named_shardings(MLPBlockParams.specs(config), mesh, config.axis_rules)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings)
        y = jax.jit(mlp_block, static_argnums=2)(params, x, config)

The mesh may have automatic or explicit axes (`jax.sharding.AxisType`). Pass `config.axis_rules` to these functions: the
same rules tell XLA how to split the arrays inside the feed-forward, and give Flax's own functions the names of mesh
axes for NNX modules (`nnx.get_partition_spec`, `nnx.get_named_sharding`, `nnx.eval_shape` under a mesh). Without
`axis_rules` the modules' names are the logical axes alone, and these functions need
`flax.linen.logical_axis_rules(rules)` around them, as Linen's `init` does with a mesh in force.
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
    checked_rules,
    mesh_axes,
    partition_spec,
    require_divisible,
)
from gemma_mlp.params import LeafSpec

__all__ = ["RULES", "SEQUENCE_PARALLEL_RULES", "Rules", "activation_sharding", "named_shardings", "optimizer_shardings"]

BOXES = (nnx.Variable, nn.Partitioned, LeafSpec)  # the types of leaves that carry logical axes


def named_shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns a tree like `tree` that has a sharding for every leaf.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s that carry logical axes. This may be the `nnx.State` of a model or of an
        `nnx.Optimizer`, Linen's variables or train state with their boxes, as `init` returns them, or
        `MLPBlockParams.specs(config)`. It may hold other people's parameters too, whose names are logical axes of the
        rules or axes of the mesh. Leaves without names are replicated on every device.
      mesh: the devices.
      rules: says which mesh axes split each logical axis. A name that has no rule stands for the mesh axis of that
        name.

    Raises:
      ValueError: if a mesh axis does not divide the axis that it splits, the mesh lacks an axis that the rules name, a
        name is neither that of a rule nor that of a mesh axis, or no leaf of the tree has names.
    """
    rules = checked_rules(rules)
    known = {name for name, _ in rules}

    def is_box(leaf):
        return isinstance(leaf, BOXES)

    require(
        any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box))),
        "Shardings follow from logical axes.",
        "a tree of arrays alone",
        "give MLPBlockParams.specs(config), nnx.state(model), or Linen's variables before nn.unbox.",
    )

    def sharding(axes, shape):
        axes = tuple(axes.spec if isinstance(axes, NamedSharding) else axes)
        theirs = {axis for axis in axes if axis not in known and set(mesh_axes(axis)) <= set(mesh.axis_names)}
        ours = partition_spec([None if axis in theirs else axis for axis in axes], rules)
        spec = PartitionSpec(*(axis if axis in theirs else entry for axis, entry in zip(axes, ours)))
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
    """Returns a sharding for every leaf of `optimizer.init(params)`.

    A leaf that belongs to a parameter, such as a moment, is sharded like the parameter. Every other leaf, such as a
    step count, is replicated on `mesh`. `params` are the parameters or their `jax.ShapeDtypeStruct`s; `shardings` is a
    tree of the same structure.
    """
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def leaf_rules(axes: tuple[str | None, ...], rules: Rules) -> Rules:
    """`rules` for a leaf with these logical axes, by which no mesh axis splits two of them; Flax does not look."""
    named = ((name, split) for name, split in zip(axes, partition_spec(axes, rules)) if name is not None)
    return (*named, *(rule for rule in rules if rule[0] not in axes))


def activation_sharding(shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Returns the sharding of the residual stream [*B, D] between blocks.

    The first axis is `batch`. Of three or more axes, the second last is `length`. D is not split. `rules` are as for
    :func:`named_shardings`.

    Raises:
      ValueError: if a mesh axis does not divide the axis that it splits, or the mesh lacks an axis that the rules name.
    """
    rules = checked_rules(rules)
    return NamedSharding(mesh, activation_spec(shape, None, mesh, rules))
