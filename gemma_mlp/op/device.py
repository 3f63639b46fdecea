"""The device that a program is compiled for."""

from typing import Any

import jax
from jax.extend import backend


def target_device() -> Any:
    """Of the mesh in force an abstract device, or else JAX's default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or backend.get_default_device()
