"""Logical axes on a mesh: the rules that say which mesh axes each is split over, and what follows for one array.

Rules are pairs (logical axis, mesh axis or axes or None), as Flax, T5X and MaxText have them. The mesh is the one in
force (`jax.set_mesh`); without one there is nothing to split, and rules change nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax.linen import spmd
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from gemma_mlp.checks import require

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
LOGICAL_AXES = ("batch", "length", "embed", "mlp")

# Fully sharded data parallelism (ZeRO-3, arXiv:1910.02054) and tensor parallelism (arXiv:1909.08053): the batch is
# split over data and fsdp, weights over fsdp and tensor.
RULES: Rules = (("batch", ("data", "fsdp")), ("length", None), ("embed", "fsdp"), ("mlp", "tensor"))
# Sequence parallelism (arXiv:2205.05198) besides: outside of the feed-forward tensor splits the length.
SEQUENCE_PARALLEL_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("length", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
)


def require_rules(rules: Any) -> None:
    """Raises ValueError unless `rules` are hashable pairs, one for each logical axis of the block at least."""
    pairs = isinstance(rules, tuple) and all(isinstance(rule, tuple) and len(rule) == 2 for rule in rules)
    fix = "gemma_mlp.sharding.RULES is an example."
    require(pairs, "axis_rules is a tuple of pairs (logical axis, mesh axes).", repr(rules), fix)
    names = [name for name, _ in rules]
    complete = set(LOGICAL_AXES) <= set(names) and len(set(names)) == len(names)
    require(complete, f"axis_rules has one rule for each of {', '.join(LOGICAL_AXES)}.", repr(rules), fix)
    for _, parts in rules:
        valid = parts is None or all(isinstance(part, str) for part in mesh_axes(parts))
        require(valid, "A rule's mesh axes are a name, a tuple of names or None.", repr(parts), fix)


def mesh_axes(parts: Any) -> tuple[Any, ...]:
    """The mesh axes of one entry of a rule or of a PartitionSpec."""
    return () if parts is None else parts if isinstance(parts, tuple) else (parts,)


def partition_spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """How an array with these logical axes is split. A mesh axis that two of them ask for goes to `mlp`.

    Raises:
      ValueError: if there is no rule for an axis.
    """
    unknown = {name for name in axes if name is not None} - {name for name, _ in rules}
    require(
        not unknown,
        f"axis_rules says how each logical axis is split: {', '.join(name for name, _ in rules)}.",
        ", ".join(sorted(unknown)),
        "add a rule, such as (name, None) for an axis that is not split.",
    )
    hidden_first = sorted(rules, key=lambda rule: rule[0] != "mlp")  # Flax gives an axis to the first rule that asks
    spec = spmd.logical_to_mesh_axes(tuple(axes), hidden_first)
    assert spec is not None  # as axes are given
    return spec


def require_divisible(
    name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | AbstractMesh, rules: Rules
) -> None:
    """Raises ValueError unless the mesh has the axes of `spec` and each divides the axis of `shape` it splits."""
    for size, parts in zip(shape, spec):
        missing = [part for part in mesh_axes(parts) if part not in mesh.shape]
        require(
            not missing,
            f"axis_rules names axes of the mesh, {', '.join(map(str, mesh.axis_names))}.",
            f"{', '.join(missing)} in {rules}",
            "name the mesh's own axes, or make the mesh with these (an axis may have size 1).",
        )
        count = math.prod(mesh.shape[part] for part in mesh_axes(parts))
        require(
            size % count == 0,
            f"A split axis is a multiple of the devices it is split over: {count}, of mesh axes {parts}.",
            f"{size} in {name} {list(shape)}, split as {spec}",
            "change the size, the mesh, or axis_rules.",
        )


def activation_spec(shape: Sequence[int], last: str | None, mesh: Mesh | AbstractMesh, rules: Rules) -> PartitionSpec:
    """How an activation is split: [*B, D] with `last` None, [*B, F] with `last` "mlp".

    Raises:
      ValueError: if an axis does not divide, or the mesh has no such axis.
    """
    lead = (token_axis(len(shape), axis) for axis in range(len(shape) - 1))
    spec = partition_spec((*lead, last), rules)
    require_divisible("an activation", shape, spec, mesh, rules)
    return spec


def token_axis(ndim: int, axis: int) -> str | None:
    """The logical name of one of an activation's leading axes: the first is `batch`, the second last of three or more
    `length`."""
    return "batch" if axis == 0 else "length" if axis == ndim - 2 else None


def constrain(array: jax.Array, last: str | None, rules: Rules | None) -> jax.Array:
    """`array`, split over the mesh in force as :func:`activation_spec` says."""
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return array
    return jax.lax.with_sharding_constraint(array, activation_spec(array.shape, last, mesh, rules))


def count_shards(name: str | None, rules: Rules | None) -> int:
    """Into how many parts a logical axis is split on the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or name is None:
        return 1
    return math.prod(mesh.shape[part] for part in mesh_axes(dict(rules)[name]))


def spec_of(array: jax.Array) -> PartitionSpec:
    """How the type of an array on a mesh of explicit axes says that it is split."""
    return jax.typeof(array).sharding.spec


def placed_automatically(function: Callable, like: Callable[..., PartitionSpec]) -> Callable:
    """`function`, its inside sharded by the compiler where the mesh in force has explicit axes.

    Args:
      function: of arrays, to one array.
      like: from the same arrays to the sharding of the result on such a mesh.
    """

    def run(*args):
        if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
            return function(*args)
        return jax.sharding.auto_axes(function, out_sharding=like(*args))(*args)

    return run
