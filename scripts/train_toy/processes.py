"""Lets several processes share a run: they find each other, wait for each other and end together."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 20  # JAX takes a process that is silent for so long for dead, and ends all that wait for it


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several.

    JAX asks the cluster (SLURM, MPI, GKE, Cloud TPU) for every argument that is None.

    Raises:
      RuntimeError: if the other processes do not connect in time.
    """
    jax.distributed.initialize(
        coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def is_first() -> bool:
    """Whether this process is the one that writes the records."""
    return jax.process_index() == 0


def gathered(tree: Any) -> Any:
    """Returns `tree` with every array complete in the memory of this process."""
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)


def wait_for_all(what: str) -> None:
    """Returns once every process has come to this line."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextmanager
def all_or_none() -> Iterator[None]:
    """Ends this process, with a message, when a computation that it shares with others fails because one has died.

    It ends at once, because the orderly exits of JAX and Orbax would wait for the process that died.
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
