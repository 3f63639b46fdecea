"""Places the arrays of a run on the first device, or on a mesh of all devices."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import meshes
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gemma_mlp import sharding
from gemma_mlp.checks import require

RULES: sharding.Rules = (*sharding.RULES, ("heads", "tensor"), ("vocabulary", None))


def make_mesh(text: str) -> Mesh | None:
    """The mesh of all devices that `text` describes, such as "data=1,fsdp=2,tensor=2". None if `text` is empty.

    Raises:
      ValueError: if `text` is not of this form, if the sizes do not multiply to the number of devices, or if `text`
        is empty although there are several processes.
    """
    if not text:
        fix = 'pass --config.mesh="data=1,fsdp=2,tensor=2" or the like.'
        require(jax.process_count() == 1, "A run of several processes must have a config.mesh.", "none", fix)
        return None
    shape = meshes.parse(text)
    require(
        math.prod(shape) == jax.device_count(),
        f"The mesh must have as many places as there are devices, {jax.device_count()}.",
        repr(text),
        "change --config.mesh.",
    )
    return jax.make_mesh(shape, meshes.AXES, (AxisType.Auto,) * len(shape))


class Placement(NamedTuple):
    """Puts the arrays of a run onto `mesh`, or onto the first device if `mesh` is None."""

    mesh: Mesh | None

    @property
    def rules(self) -> sharding.Rules | None:
        """The mesh axis of each logical axis of the model; None without a mesh."""
        return None if self.mesh is None else RULES

    @property
    def rows(self) -> Any:
        """The sharding of a batch [B, ...]: its rows are split over data and fsdp."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    @property
    def replicated(self) -> Any:
        """The sharding of an array that every device holds as a whole; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    @property
    def row_shards(self) -> int:
        """How many shards a batch is split into."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def count_rows(self, least: int) -> int:
        """The smallest batch size of at least `least` that the shards divide evenly."""
        return -(-least // self.row_shards) * self.row_shards

    def batch(self, shape: tuple[int, ...], dtype: str, read: Callable[[range], np.ndarray]) -> jax.Array:
        """A batch for which each process calls `read(rows)` only for the rows of its own devices."""

        def shard(index: Any) -> np.ndarray:
            return read(range(shape[0])[index[0]]).astype(dtype)

        return jax.make_array_from_callback(shape, self.rows, shard)

    def on(self, function: Callable) -> Callable:
        """Makes `function` run with the mesh set."""
        if self.mesh is None:
            return function
        mesh = self.mesh

        def run(*args):
            with jax.set_mesh(mesh):
                return function(*args)

        return run


ONE_DEVICE = Placement(None)
