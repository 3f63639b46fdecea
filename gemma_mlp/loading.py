"""Puts layers onto devices tensor by tensor: beside the result one of them is in memory, two where layers stack."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gemma_mlp.checks import describe, require
from gemma_mlp.dtypes import accumulation_dtype, compute_dtype
from gemma_mlp.params import MLPBlockParams
from gemma_mlp.trees import Layout, Slot, block_leaves, locate, make_params

Progress = Callable[[Sequence[str]], Iterable[str]]


class Source(NamedTuple):
    """Layers of a checkpoint of which everything but the values is known to be right."""

    layout: Layout
    tensors: Mapping[str, Any]  # by name, with shape and dtype
    slots: Mapping[int, Mapping[str, Slot]]  # by layer and leaf
    where: Callable[[str], str]  # the file of a tensor

    @classmethod
    def of(cls, layout: Layout, tensors: Mapping[str, Any], num_layers: int, layers: Sequence[int], where) -> "Source":
        """Errors are those of :func:`gemma_mlp.trees.locate`."""
        return cls(layout, tensors, dict(zip(layers, locate(layout, tensors, num_layers, layers, where))), where)

    def shapes(self) -> list[MLPBlockParams]:
        """What there is to load, as `jax.ShapeDtypeStruct`s."""

        def shape(slot):
            tensor = self.tensors[slot.tensor]
            return slot.read(jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))

        return [make_params({leaf: shape(slot) for leaf, slot in layer.items()}) for layer in self.slots.values()]


def choose_layers(num_layers: int, layers: Sequence[int] | None) -> Sequence[int]:
    """The numbers of the layers asked for.

    Raises:
      ValueError: if there is no such layer, or one is asked for twice, or none.
    """
    numbers = range(num_layers) if layers is None else [operator.index(layer) for layer in layers]
    require(
        len(numbers) > 0 and len(set(numbers)) == len(numbers) and all(0 <= number < num_layers for number in numbers),
        f"layers names some of the layers 0 to {num_layers - 1}, each once.",
        str(list(numbers)),
        "check layers=.",
    )
    return numbers


def load(
    source: Source,
    fetch: Callable[[Slot, tuple[int, ...], Any, Any], jax.Array],
    *,
    dtype: Any,
    shardings: Any,
    stacked: bool,
    progress: Progress | None,
) -> Any:
    """A list of layers, or one stack of them.

    Args:
      source: where they are.
      fetch: gives one leaf: (slot, shape, dtype, sharding) -> array. Leaves of one tensor are asked for in a row.
      dtype: to cast to; None: that of the tensors.
      shardings: None, a device, or an `MLPBlockParams` of shardings, of stacked leaves if `stacked`.
      stacked: whether to stack.
      progress: wraps what is iterated over, tensor by tensor, as tqdm does.

    Raises:
      ValueError: if a tensor is not finite; for a dtype or a sharding that cannot be had.
    """
    shapes = {leaf: source.layout.shape(axes, 0, 1) for leaf, axes in source.layout.leaves.items()}
    lead = (len(source.slots),) if stacked else ()
    placed = leaf_shardings(shardings, {leaf: (*lead, *shape) for leaf, shape in shapes.items()})
    by_tensor: dict[str, list[tuple[int, Slot]]] = {}
    for position, slots in enumerate(source.slots.values()):
        for slot in slots.values():
            by_tensor.setdefault(slot.tensor, []).append((position, slot))

    gathering = Gathering(len(source.slots), shapes, placed, stacked)
    for name in progress(list(by_tensor)) if progress else by_tensor:
        for position, slot in by_tensor[name]:
            own = source.tensors[name].dtype
            target = compute_dtype(dtype or (accumulation_dtype(own) if slot.plus_one else own))
            # No name holds the array, which would keep it until the next has come.
            gathering.add(
                position,
                slot.leaf,
                fetch(slot, shapes[slot.leaf], target, gathering.sharding(slot.leaf)),
                f"{name} in {source.where(name)}",
            )
    return gathering.result()


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
    parts: dict[tuple, tuple[tuple[slice, ...], list[Any]]] = {}
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
      shapes: of the leaves of a layer.
      shardings: of the leaves of the result.
      stacked: whether to stack them.
    """

    def __init__(
        self, num_layers: int, shapes: Mapping[str, tuple[int, ...]], shardings: Mapping[str, Any], stacked: bool
    ):
        self._num_layers, self._shapes, self._shardings, self._stacked = num_layers, shapes, shardings, stacked
        self._layers: list[dict[str, jax.Array]] = [{} for _ in range(num_layers)]
        self._stacks: dict[str, dict[Any, jax.Array]] = {}  # by leaf and device

    def sharding(self, leaf: str) -> Any:
        """How one layer's leaf is to come."""
        return without_layers(self._shardings[leaf]) if self._stacked else self._shardings[leaf]

    def add(self, layer: int, leaf: str, array: jax.Array, name: str) -> None:
        """Takes one leaf, `name` in messages.

        Raises:
          ValueError: if it is not finite.
        """
        require_finite(name, array)
        if not self._stacked:
            self._layers[layer][leaf] = array
            return
        shape, sharding = (self._num_layers, *self._shapes[leaf]), self._shardings[leaf]
        if leaf not in self._stacks:
            self._stacks[leaf] = {
                device: jnp.zeros(sharding.shard_shape(shape), array.dtype, device=device)
                for device in sharding.addressable_devices
            }
        stack, indices = self._stacks[leaf], sharding.addressable_devices_indices_map(shape)
        for shard in array.addressable_shards:
            start, stop, _ = indices[shard.device][0].indices(self._num_layers)
            if start <= layer < stop:
                stack[shard.device] = _set_layer(stack[shard.device], layer - start, shard.data)
        jax.block_until_ready(list(stack.values()))

    def result(self) -> Any:
        """All that came."""
        if not self._stacked:
            return [make_params(layer) for layer in self._layers]
        stacks = {}
        for leaf, parts in self._stacks.items():
            sharding = self._shardings[leaf]
            shape = (self._num_layers, *self._shapes[leaf])
            stacks[leaf] = jax.make_array_from_single_device_arrays(shape, sharding, list(parts.values()))
        return make_params(stacks)


def require_finite(name: str, array: Any) -> None:
    """Raises ValueError unless all of the array is finite."""
    if not _all_finite(array):
        count = int((~jnp.isfinite(array)).sum())
        raise ValueError(
            f"{name} is finite. Received: {count} numbers that are not, of {array.size}. Fix: find a sound copy."
        )


@jax.jit
def _all_finite(array):
    return jnp.isfinite(array).all()


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack, number, layer):
    return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)  # in place, which stack.at[number].set is not
