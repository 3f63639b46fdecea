"""Logical axes on a mesh: from rules to specs, to constraints, to kernels that run on each device's shard.

Rules are pairs (logical axis, mesh axis or axes or None), as in Flax, T5X and MaxText. The mesh is the one in force
(`jax.set_mesh`); without a mesh the rules change nothing.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import backend
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from gemma_mlp.checks import require

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
LOGICAL_AXES = ("batch", "length", "embed", "mlp")

# Fully sharded data parallelism (ZeRO-3, arXiv:1910.02054) and tensor parallelism (arXiv:1909.08053): the batch is
# split over data and fsdp, weights over fsdp and tensor.
RULES: Rules = (("batch", ("data", "fsdp")), ("length", None), ("embed", "fsdp"), ("mlp", "tensor"), ("layers", None))
# Sequence parallelism (arXiv:2205.05198) in addition: outside the feed-forward, tensor splits the length.
SEQUENCE_PARALLEL_RULES: Rules = (RULES[0], ("length", "tensor"), *RULES[2:])


def checked_rules(rules: Any) -> Rules:
    """`rules` as tuples; lists, as JSON and YAML have them, are taken too.

    Raises:
      ValueError: unless they are pairs, with one rule for each logical axis of the block.
    """
    fix = "gemma_mlp.sharding.RULES is an example."
    sequence = (tuple, list)
    pairs = isinstance(rules, sequence) and all(isinstance(rule, sequence) and len(rule) == 2 for rule in rules)
    require(pairs, "axis_rules must be pairs (logical axis, mesh axes).", repr(rules), fix)
    rules = tuple((name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in rules)
    names = [str(name) for name, _ in rules]
    complete = set(LOGICAL_AXES) <= set(names) and len(set(names)) == len(names)
    require(complete, f"axis_rules must have one rule for each of {', '.join(LOGICAL_AXES)}.", repr(rules), fix)
    for _, axes in rules:
        valid = axes is None or all(isinstance(axis, str) for axis in mesh_axes(axes))
        require(valid, "A rule's mesh axes must be a name, a tuple of names or None.", repr(axes), fix)
    return rules


def mesh_axes(entry: Any) -> tuple[Any, ...]:
    """The mesh axes in one entry of a rule or of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def partition_spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """How to split an array with these logical axes. If two of them map to the same mesh axis, `mlp` gets it.

    Raises:
      ValueError: if there is no rule for an axis.
    """
    from flax.linen import spmd

    unknown = {name for name in axes if name is not None} - {name for name, _ in rules}
    require(
        not unknown,
        f"axis_rules must say how each logical axis is split. They know {', '.join(name for name, _ in rules)}.",
        ", ".join(sorted(unknown)),
        "add a rule, such as (name, None) for an axis that is not split.",
    )
    hidden_first = sorted(rules, key=lambda rule: rule[0] != "mlp")  # Flax gives a mesh axis to the first rule
    spec = spmd.logical_to_mesh_axes(tuple(axes), hidden_first)
    assert spec is not None  # because `axes` is not None
    return spec


def require_divisible(
    name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | AbstractMesh, rules: Rules
) -> None:
    """Raises ValueError unless the mesh has the axes of `spec` and each divides the axis of `shape` that it splits."""
    for size, entry in zip(shape, spec):
        missing = [axis for axis in mesh_axes(entry) if axis not in mesh.shape]
        require(
            not missing,
            f"axis_rules must name axes of the mesh, which are {', '.join(map(str, mesh.axis_names))}.",
            f"{', '.join(missing)} in {rules}",
            "name the mesh's own axes, or make the mesh with these (an axis may have size 1).",
        )
        count = math.prod(mesh.shape[axis] for axis in mesh_axes(entry))
        require(
            size % count == 0,
            f"A split axis must be a multiple of the number of its shards: {count}, for mesh axes {entry}.",
            f"{size} in {name} {list(shape)}, split as {spec}",
            "change the size, the mesh, or axis_rules.",
        )


def activation_spec(shape: Sequence[int], last: str | None, mesh: Mesh | AbstractMesh, rules: Rules) -> PartitionSpec:
    """How to split an activation: [*B, D] with `last` None, [*B, F] with `last` "mlp".

    Raises:
      ValueError: if an axis does not divide, or the mesh has no such axis.
    """
    lead = (token_axis(len(shape), axis) for axis in range(len(shape) - 1))
    spec = partition_spec((*lead, last), rules)
    require_divisible("an activation", shape, spec, mesh, rules)
    return spec


def token_axis(ndim: int, axis: int) -> str | None:
    """The logical name of a leading axis of an activation: the first is `batch`; of three or more axes, the second
    last is `length`."""
    return "batch" if axis == 0 else "length" if axis == ndim - 2 else None


def constrain(array: jax.Array, last: str | None, rules: Rules | None) -> jax.Array:
    """`array`, split over the mesh in force as :func:`activation_spec` says.

    op/xla.py calls it for the residual stream and for the hidden activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return array
    return lax.with_sharding_constraint(array, activation_spec(array.shape, last, mesh, rules))


def count_shards(name: str | None, rules: Rules | None) -> int:
    """Into how many shards the mesh in force splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or name is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in mesh_axes(dict(rules)[name]))


def automatic_rules(rules: Rules | None) -> Rules | None:
    """`rules` for the axes of the mesh in force that XLA splits: without those that a `shard_map` around us split."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes)
    if rules is None or not manual:
        return rules
    if manual == set(mesh.axis_names):
        return None
    return tuple((name, tuple(axis for axis in mesh_axes(axes) if axis not in manual) or None) for name, axes in rules)


def vary_alike(tree: Any) -> Any:
    """`tree`, with each array marked as varying over every manual axis that one of them varies over.

    Inside `jax.shard_map` JAX gives each array's type these axes. A custom backward pass must return gradients of its
    inputs' types, and a loop must end with its carry's types. Where an input is marked here, JAX adds its gradient up.
    """
    every = varying_axes(tree)
    return jax.tree.map(lambda a: lax.pcast(a, tuple(sorted(every - varying_axes(a))), to="varying"), tree)


def varying_axes(tree: Any) -> frozenset[str]:
    """The manual axes that an array varies over inside a `jax.shard_map` which checks that (`check_vma`)."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(tree)))


def spec_of(array: jax.Array) -> PartitionSpec:
    """How an array on a mesh of explicit axes is split, as its type says."""
    return jax.typeof(array).sharding.spec


def placed_automatically(function: Callable, like: Callable[..., PartitionSpec]) -> Callable:
    """`function`, run under `jax.sharding.auto_axes` if the mesh has explicit axes: the mesh in force, or the arrays'.

    Args:
      function: takes arrays and returns one array.
      like: takes the same arrays and returns the sharding of the result on such a mesh.
    """

    def run(*args):
        meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(a).sharding.mesh for a in jax.tree.leaves(args))]
        mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
        if AxisType.Explicit not in mesh.axis_types:
            return function(*args)
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(function, out_sharding=like(*args))(*args)

    return run


def target_device() -> Any:
    """The device that a program is compiled for: the mesh's in force (abstract), or else JAX's default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or backend.get_default_device()


def mesh_to_split() -> AbstractMesh | None:
    """The mesh in force, if it has several devices and we are not inside a `shard_map` over all of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    return None if whole else mesh


def run_on_mesh(
    kernel: Callable, arguments: Sequence[tuple[str, Array]], results: Sequence[str], rules: Rules | None
) -> list[Array]:
    """Runs a kernel on each device's shard: whole rows of its tokens, its slice of F. Then it adds over devices.

    Without a mesh of several devices the kernel runs as it is. One word describes each array:

    - "rows": x or dy, [*B, D], with whole rows; a kernel gets them as [T, D];
    - "hidden": [*B, F]; a kernel gets them as [T, F];
    - "DF", "FD": a weight. As an argument its axis D is gathered; as a result it is a gradient, summed over tokens;
    - "sum": as a result, [*B, D], which still has to be summed over F.

    Args:
      kernel: takes arrays and returns a tuple of arrays.
      arguments: a word and an array for each argument. One of them is "rows", one a weight.
      results: the words of what the kernel returns.
      rules: which mesh axes each logical axis is split over.
    """
    words, arrays = zip(*arguments)
    weights = ("DF", "FD")

    def run_shard(finish, *arrays):
        lead = next(a.shape[:-1] for word, a in zip(words, arrays) if word == "rows")
        flat = [a if word in weights else a.reshape(-1, a.shape[-1]) for word, a in zip(words, arrays)]
        shaped = [(w, a if w in weights else a.reshape(*lead, a.shape[-1])) for w, a in zip(results, kernel(*flat))]
        return [finish(word, a) for word, a in shaped]

    mesh = mesh_to_split()
    if mesh is None:
        return run_shard(lambda word, array: array, *arrays)
    assert rules is not None  # `choose_backend` requires it
    shape = next(a.shape for word, a in arguments if word == "rows")
    hidden_dim = next(a.shape[word.index("F")] for word, a in arguments if word in weights)
    *lead, hidden = activation_spec((*shape[:-1], hidden_dim), "mlp", mesh, rules)
    # If the length is split like F (sequence parallelism), the sum over F is scattered over the length.
    stream = activation_spec(shape, None, mesh, rules)
    alike = [i for i, axes in enumerate(lead) if axes is None and stream[i] is not None and stream[i] == hidden]
    scattered = alike[0] if alike else None
    token_axes = tuple(axis for axes in lead for axis in mesh_axes(axes))
    # If the embed axis is split over devices with other tokens, a sum over tokens is scattered over the embed axis.
    embed_axes = mesh_axes(partition_spec(("embed", "mlp"), rules)[0])
    embed_axes = embed_axes if set(embed_axes) <= set(token_axes) else ()

    def finish(word, array):
        if word == "hidden":
            return array
        if word == "sum":
            if scattered is None:
                return lax.psum(array, mesh_axes(hidden))
            return lax.psum_scatter(array, mesh_axes(hidden), scatter_dimension=scattered, tiled=True)
        if embed_axes:
            array = lax.psum_scatter(array, embed_axes, scatter_dimension=word.index("D"), tiled=True)
        return lax.psum(array, tuple(axis for axis in token_axes if axis not in embed_axes))

    def specs(words, embed):
        summed = [hidden if i == scattered else axes for i, axes in enumerate(lead)]
        known = {"rows": (*lead, None), "hidden": (*lead, hidden), "sum": (*summed, None)}
        known |= {"DF": (embed, hidden), "FD": (hidden, embed)}
        return tuple(PartitionSpec(*known[word]) for word in words)

    run = functools.partial(run_shard, finish)
    out_specs = list(specs(results, embed_axes or None))
    return jax.shard_map(run, in_specs=specs(words, None), out_specs=out_specs, check_vma=False)(*arrays)
