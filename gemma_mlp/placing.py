"""Puts layers onto devices leaf by leaf, so that beside the result no more than one tensor is in memory."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gemma_mlp.checks import describe, require
from gemma_mlp.params import MLPBlockParams
from gemma_mlp.trees import block_leaves, make_params

Leaves = Mapping[str, Any]


def leaf_shardings(shardings: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sharding of each leaf, from what a caller gives: None, a device, or an `MLPBlockParams` of shardings.

    Raises:
      ValueError: if it is none of these, or does not divide the shapes.
    """
    if shardings is None or isinstance(shardings, jax.Device):
        device = shardings or jnp.zeros(()).device
        return dict.fromkeys(shapes, SingleDeviceSharding(device))
    require(
        isinstance(shardings, MLPBlockParams) and block_leaves(shardings).keys() == shapes.keys(),
        f"Shardings are a device, or an MLPBlockParams with one for {', '.join(shapes)}.",
        describe(shardings),
        "gemma_mlp.trees.make_params makes one of a dict.",
    )
    leaves = block_leaves(shardings)
    for name, shape in shapes.items():
        require(
            isinstance(leaves[name], NamedSharding | SingleDeviceSharding),
            "A sharding is a NamedSharding or a SingleDeviceSharding.",
            f"{describe(leaves[name])} for {name}",
            "jax.NamedSharding(mesh, jax.P(...)).",
        )
        leaves[name].shard_shape(shape)  # raises where it does not divide
    return leaves


def place(read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: Any) -> jax.Array:
    """An array of which `read` gives any part; one part is on the host at a time, and replicas are read once."""
    parts: dict[tuple, tuple[tuple[slice, ...], list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple(part.indices(size) for part, size in zip(index, shape))
        parts.setdefault(key, (tuple(slice(*bounds) for bounds in key), []))[1].append(device)
    shards = []
    for index, devices in parts.values():
        part = read(index)
        shards += [jax.block_until_ready(jax.device_put(part, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def without_layers(sharding: Any) -> Any:
    """The sharding of one layer of a stack."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


class Gathering:
    """Takes the leaves of layers one by one, in any order, and gives a list of layers or one stack.

    Args:
      num_layers: how many will come.
      shardings: of the leaves of the result.
      stacked: whether to stack them.
    """

    def __init__(self, num_layers: int, shardings: Mapping[str, Any], stacked: bool):
        self._num_layers, self._shardings, self._stacked = num_layers, shardings, stacked
        self._layers: list[dict[str, jax.Array]] = [{} for _ in range(num_layers)]
        self._stack: dict[str, jax.Array] = {}

    def sharding(self, leaf: str) -> Any:
        """How one layer's leaf is to come."""
        return without_layers(self._shardings[leaf]) if self._stacked else self._shardings[leaf]

    def add(self, layer: int, leaf: str, array: jax.Array, name: str) -> None:
        """Takes one leaf, `name` in messages.

        Raises:
          ValueError: if it is not finite.
        """
        count = int(_count_not_finite(array))
        require(count == 0, f"{name} is finite.", f"{count} numbers that are not", "the checkpoint is damaged.")
        if not self._stacked:
            self._layers[layer][leaf] = array
            return
        if leaf not in self._stack:
            shape, sharding = (self._num_layers, *array.shape), self._shardings[leaf]
            self._stack[leaf] = jnp.zeros(shape, array.dtype, device=sharding)
        self._stack[leaf] = jax.block_until_ready(_set_layer(self._stack[leaf], layer, array))

    def result(self) -> Any:
        return make_params(self._stack) if self._stacked else [make_params(layer) for layer in self._layers]


@jax.jit
def _count_not_finite(array):
    return jnp.sum(~jnp.isfinite(array), dtype="int32")


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack, number, layer):
    return stack.at[number].set(layer)
