"""The processes and the mesh of a run, and how its data come onto them. All of it is JAX's own."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import meshes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gemma_mlp import sharding
from gemma_mlp.checks import require

HEARTBEAT_SECONDS = 20  # without a word from a process, after which JAX ends the others that wait for it
RULES: sharding.Rules = (*sharding.RULES, ("heads", "tensor"), ("vocabulary", None))


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several; where no address is given, JAX asks the cluster (SLURM, MPI, GKE, Cloud TPU).

    Raises:
      RuntimeError: if the others do not come.
    """
    jax.distributed.initialize(
        coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def is_first() -> bool:
    """Whether this process is the one that writes records."""
    return jax.process_index() == 0


def make_mesh(text: str) -> Mesh | None:
    """The mesh that `config.mesh` describes, such as "data=1,fsdp=2,tensor=2", of all devices; "": one device, no mesh.

    Raises:
      ValueError: if the text is not of this form, or its sizes do not make up the devices there are.
    """
    if not text:
        fix = 'pass --config.mesh="data=1,fsdp=2,tensor=2" or the like.'
        require(jax.process_count() == 1, "Several processes need a config.mesh.", "none", fix)
        return None
    shape = meshes.parse(text)
    require(
        math.prod(shape) == jax.device_count(),
        f"The mesh has as many places as devices, {jax.device_count()}.",
        repr(text),
        "change --config.mesh.",
    )
    return jax.make_mesh(shape, meshes.AXES, (AxisType.Auto,) * len(shape))


class Placement(NamedTuple):
    """Where the arrays of a run go; without a mesh, to the first device."""

    mesh: Mesh | None

    @property
    def rules(self) -> sharding.Rules | None:
        """Of the model's logical axes."""
        return None if self.mesh is None else RULES

    @property
    def rows(self) -> Any:
        """The sharding of a batch [B, ...]."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    @property
    def whole(self) -> Any:
        """The sharding of what every device has."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    @property
    def row_parts(self) -> int:
        """Into how many parts a batch is split."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def count_rows(self, least: int) -> int:
        """The smallest batch of at least `least` rows that divides over the devices."""
        return -(-least // self.row_parts) * self.row_parts

    def batch(self, shape: tuple[int, ...], dtype: str, read: Callable[[range], np.ndarray]) -> jax.Array:
        """A batch of which every process reads the rows that go to its own devices."""

        def part(index: Any) -> np.ndarray:
            return read(range(shape[0])[index[0]]).astype(dtype)

        return jax.make_array_from_callback(shape, self.rows, part)

    def on(self, function: Callable) -> Callable:
        """`function`, called with the mesh in force."""
        if self.mesh is None:
            return function
        mesh = self.mesh

        def run(*args):
            with jax.set_mesh(mesh):
                return function(*args)

        return run


ONE_DEVICE = Placement(None)


def gathered(tree: Any) -> Any:
    """The whole of every array, in this process's memory."""
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)


def wait_for_all(what: str) -> None:
    """Returns once every process has come to this line."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextmanager
def all_or_none() -> Iterator[None]:
    """Ends this process with a message when what it does with others fails, as it does when one of them has died.

    At once, because leaving in order, as JAX and Orbax do, would wait for the one that died.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        message = (
            f"The {jax.process_count()} processes of a run go on together. Received in process {jax.process_index()}: "
            f"{error}. Fix: see why the other process ended, then start all again, as many as you like: the run "
            "continues from its last checkpoint."
        )
        print(message, file=sys.stderr, flush=True)
        os._exit(1)
