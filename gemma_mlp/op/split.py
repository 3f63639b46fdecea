"""How a kernel runs on a mesh: each device on its own part, sums over devices added up after it."""

from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from gemma_mlp.mesh import Rules, activation_spec, mesh_axes, partition_spec


def mesh_to_split():
    """The mesh in force, if it has several devices that a program is still to be split over."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    return None if whole else mesh


class Split:
    """One feed-forward on the mesh in force: a device has whole rows of its tokens and its part of F.

    Without such a mesh there is nothing to split, and functions run as they are.

    Attributes:
      rows: how x [*B, D] is split where a kernel takes it.
      hidden: how arrays [*B, F] are.
      weights: how gate_proj, up_proj and down_proj are there; their embed axis is gathered.
      stream: how the sum over F is split, of y or of the gradient of x.
      dweights: how the weights' gradients are, summed over tokens.
    """

    def __init__(self, shape: Sequence[int], hidden_dim: int, rules: Rules | None):
        self._mesh = mesh = mesh_to_split()
        if mesh is None:
            self.rows = self.hidden = self.stream = PartitionSpec()
            self.weights = self.dweights = [PartitionSpec()] * 3
            return
        assert rules is not None  # as `backends.choose` requires
        self.hidden = activation_spec((*shape[:-1], hidden_dim), "mlp", mesh, rules)
        *lead, parts = self.hidden
        self.rows = PartitionSpec(*lead, None)
        self.weights = _weight_specs(None, parts)
        # Sums over F are scattered over an axis of the stream that is split like F, as the length is in sequence
        # parallelism; sums over tokens over the embed axis, where that is split over devices with other tokens.
        stream = activation_spec(shape, None, mesh, rules)
        alike = [i for i, axes in enumerate(lead) if axes is None and stream[i] is not None and stream[i] == parts]
        self._scattered = alike[0] if alike else None
        self.stream = PartitionSpec(*[parts if i in alike[:1] else axes for i, axes in enumerate(lead)], None)
        self._parts = mesh_axes(parts)
        self._tokens = tuple(axis for axes in lead for axis in mesh_axes(axes))
        embed = mesh_axes(partition_spec(("embed", "mlp"), rules)[0])
        self._embed = embed if set(embed) <= set(self._tokens) else ()
        self.dweights = _weight_specs(self._embed or None, parts)

    def run(self, function: Callable, in_specs: Sequence[PartitionSpec], out_specs: Sequence[PartitionSpec], *arrays):
        """function(*arrays), a tuple, by each device on its part."""
        if self._mesh is None:
            return function(*arrays)
        return jax.shard_map(function, in_specs=tuple(in_specs), out_specs=tuple(out_specs), check_vma=False)(*arrays)

    def add_over_hidden(self, y: Array) -> Array:
        """The sum over the devices that have parts of F, split as `stream`."""
        if self._mesh is None:
            return y
        if self._scattered is None:
            return lax.psum(y, self._parts)
        return lax.psum_scatter(y, self._parts, scatter_dimension=self._scattered, tiled=True)

    def add_over_tokens(self, dweight: Array, embed_axis: int) -> Array:
        """The sum over the devices that have other tokens, split as `dweights`."""
        if self._mesh is None:
            return dweight
        if self._embed:
            dweight = lax.psum_scatter(dweight, self._embed, scatter_dimension=embed_axis, tiled=True)
        return lax.psum(dweight, tuple(axis for axis in self._tokens if axis not in self._embed))


def _weight_specs(embed, parts):
    return [PartitionSpec(embed, parts), PartitionSpec(embed, parts), PartitionSpec(parts, embed)]
