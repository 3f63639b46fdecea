"""Logical axes on a mesh: from rules to specs, to constraints, to kernels that run on each device's shard.

Rules are pairs (logical axis, mesh axis or axes or None), as in Flax, T5X and MaxText. The mesh is the one in force
(`jax.set_mesh`); without a mesh the rules change nothing.
"""

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
RULES: Rules = (("batch", ("data", "fsdp")), ("length", None), ("embed", "fsdp"), ("mlp", "tensor"))
# Sequence parallelism (arXiv:2205.05198) in addition: outside the feed-forward, tensor splits the length.
SEQUENCE_PARALLEL_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("length", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
)


def require_rules(rules: Any) -> None:
    """Raises ValueError unless `rules` are hashable pairs with at least one rule for each logical axis of the block."""
    pairs = isinstance(rules, tuple) and all(isinstance(rule, tuple) and len(rule) == 2 for rule in rules)
    fix = "gemma_mlp.sharding.RULES is an example."
    require(pairs, "axis_rules must be a tuple of pairs (logical axis, mesh axes).", repr(rules), fix)
    names = [name for name, _ in rules]
    complete = set(LOGICAL_AXES) <= set(names) and len(set(names)) == len(names)
    require(complete, f"axis_rules must have one rule for each of {', '.join(LOGICAL_AXES)}.", repr(rules), fix)
    for _, axes in rules:
        valid = axes is None or all(isinstance(axis, str) for axis in mesh_axes(axes))
        require(valid, "A rule's mesh axes must be a name, a tuple of names or None.", repr(axes), fix)


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
    """`array`, split over the mesh in force as :func:`activation_spec` says."""
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


def spec_of(array: jax.Array) -> PartitionSpec:
    """How an array on a mesh of explicit axes is split, as its type says."""
    return jax.typeof(array).sharding.spec


def placed_automatically(function: Callable, like: Callable[..., PartitionSpec]) -> Callable:
    """`function`, whose inside the compiler shards where the mesh in force has explicit axes.

    Args:
      function: takes arrays and returns one array.
      like: takes the same arrays and returns the sharding of the result on such a mesh.
    """

    def run(*args):
        if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
            return function(*args)
        return jax.sharding.auto_axes(function, out_sharding=like(*args))(*args)

    return run


def target_device() -> Any:
    """The device that a program is compiled for: the mesh's in force (abstract), or else JAX's default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or backend.get_default_device()


def mesh_to_split() -> AbstractMesh | None:
    """The mesh in force, if it has several devices and the program is not yet the program of one of them."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    return None if whole else mesh


class OnMesh:
    """Runs a kernel on each device's shard: whole rows of its tokens, its slice of F. Then it adds over devices.

    Without a mesh of several devices the kernel runs as it is. Arrays are described by one word each:

    - "rows": x or dy, [*B, D], with whole rows; a kernel gets them as [T, D];
    - "hidden": [*B, F]; a kernel gets them as [T, F];
    - "DF", "FD": a weight. As an argument its axis D is gathered; as a result it is a gradient, summed over tokens;
    - "sum": as a result, [*B, D], which still has to be summed over F.
    """

    def __init__(self, shape: Sequence[int], hidden_dim: int, rules: Rules | None):
        self._mesh = mesh = mesh_to_split()
        if mesh is None:
            return
        assert rules is not None  # `choose_backend` requires it
        *lead, hidden = activation_spec((*shape[:-1], hidden_dim), "mlp", mesh, rules)
        # The sum over F is scattered over an axis of the residual stream that is split like F, as the length is in
        # sequence parallelism.
        stream = activation_spec(shape, None, mesh, rules)
        alike = [i for i, axes in enumerate(lead) if axes is None and stream[i] is not None and stream[i] == hidden]
        self._scattered = alike[0] if alike else None
        self._hidden_axes = mesh_axes(hidden)
        self._token_axes = tuple(axis for axes in lead for axis in mesh_axes(axes))
        # A sum over tokens is scattered over the embed axis where that is split over devices with other tokens.
        embed = mesh_axes(partition_spec(("embed", "mlp"), rules)[0])
        self._embed_axes = embed if set(embed) <= set(self._token_axes) else ()
        summed = [hidden if i == self._scattered else axes for i, axes in enumerate(lead)]
        weight, gradient = {"D": None, "F": hidden}, {"D": self._embed_axes or None, "F": hidden}
        tokens = {"rows": PartitionSpec(*lead, None), "hidden": PartitionSpec(*lead, hidden)}
        self._in_specs = tokens | {name: PartitionSpec(*(weight[a] for a in name)) for name in ("DF", "FD")}
        self._out_specs = tokens | {name: PartitionSpec(*(gradient[a] for a in name)) for name in ("DF", "FD")}
        self._out_specs["sum"] = PartitionSpec(*summed, None)

    def run(self, kernel: Callable, arguments: Sequence[tuple[str, Array]], results: Sequence[str]) -> list[Array]:
        """The results of `kernel`. `arguments` are pairs (word, array); `results` are the words of what it returns."""
        words, arrays = zip(*arguments)

        def run_shard(*arrays):
            lead = next(a.shape[:-1] for word, a in zip(words, arrays) if word in ("rows", "hidden"))
            flat = [a if word in ("DF", "FD") else a.reshape(-1, a.shape[-1]) for word, a in zip(words, arrays)]
            return [self._finish(word, a, lead) for word, a in zip(results, kernel(*flat))]

        if self._mesh is None:
            return run_shard(*arrays)
        in_specs = tuple(self._in_specs[word] for word in words)
        out_specs = [self._out_specs[word] for word in results]
        return jax.shard_map(run_shard, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

    def _finish(self, word: str, array: Array, lead: tuple[int, ...]) -> Array:
        if word not in ("DF", "FD"):
            array = array.reshape(*lead, array.shape[-1])
        if self._mesh is None or word == "hidden":
            return array
        if word == "sum":
            if self._scattered is None:
                return lax.psum(array, self._hidden_axes)
            return lax.psum_scatter(array, self._hidden_axes, scatter_dimension=self._scattered, tiled=True)
        if self._embed_axes:
            array = lax.psum_scatter(array, self._embed_axes, scatter_dimension=word.index("D"), tiled=True)
        return lax.psum(array, tuple(axis for axis in self._token_axes if axis not in self._embed_axes))
