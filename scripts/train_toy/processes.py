"""A run that several processes share: how they find each other, wait for each other and end together."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 20  # a process that is silent for so long counts as dead; JAX then ends those that wait for it


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several.

    For every argument that is None, JAX asks the cluster (SLURM, MPI, GKE, Cloud TPU).

    Raises:
      RuntimeError: if the other processes do not come.
    """
    jax.distributed.initialize(
        coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def is_first() -> bool:
    """Whether this process is the one that writes the records."""
    return jax.process_index() == 0


def gathered(tree: Any) -> Any:
    """`tree` with every array whole, in the memory of this process."""
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)


def wait_for_all(what: str) -> None:
    """Returns once every process has come to this line."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextmanager
def all_or_none() -> Iterator[None]:
    """Ends this process, with a message, when a computation that it shares with others fails because one has died.

    It ends at once: JAX's and Orbax's orderly exits would wait for the process that died.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        message = (
            f"All {jax.process_count()} processes of a run must stay alive. Got, in process {jax.process_index()}: "
            f"{error}. Fix: find out why another process ended, then start all of them again, in any number. The run "
            "continues from its last checkpoint."
        )
        print(message, file=sys.stderr, flush=True)
        os._exit(1)
