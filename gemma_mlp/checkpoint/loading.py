"""Puts layers onto devices tensor by tensor, and into stacks part by part: beside the result, one is in memory."""

import dataclasses
import functools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gemma_mlp.checks import describe, require
from gemma_mlp.dtypes import accumulation_dtype, compute_dtype
from gemma_mlp.layouts.trees import Layout, Slot, block_leaves, locate, make_params
from gemma_mlp.params import MLPBlockParams

ALIGNMENT = 64  # bytes, of memory that XLA's CPU backend takes as it is (its MinAlign)
Progress = Callable[[Sequence[str]], Iterable[str]]


class Source(NamedTuple):
    """Layers of a checkpoint of which everything but the values is known to be right."""

    layout: Layout
    tensors: Mapping[str, Any]  # by name, with shape and dtype
    slots: Mapping[int, Mapping[str, Slot]]  # by layer and leaf
    where: Callable[[str], str]  # the file of a tensor

    @classmethod
    def of(cls, layout: Layout, tensors: Mapping[str, Any], num_layers: int, layers: Sequence[int], where) -> "Source":
        """Errors are those of :func:`gemma_mlp.layouts.trees.locate`."""
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


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of a leaf on one device, with the names of a `jax.Shard`, which serves as well."""

    device: Any
    index: tuple[slice, ...]  # in the leaf
    replica_id: int  # 0 on one device
    data: jax.Array


def load(
    source: Source,
    fetch: Callable[[Slot, tuple[int, ...], Any, Any], Iterable[Any]],
    *,
    dtype: Any,
    shardings: Any,
    stacked: bool,
    progress: Progress | None,
) -> Any:
    """A list of layers, or one stack of them.

    Args:
      source: where they are.
      fetch: gives one leaf: (slot, shape, dtype, sharding) -> :class:`Part` s, one for each device unless `stacked`.
        Leaves of one tensor are asked for in a row.
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
            # No name holds the parts, which would keep them until the next have come.
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
        "gemma_mlp.layouts.trees.make_params makes one of a dict.",
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


def place(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: Any, pieces: int
) -> Iterator[Part]:
    """The parts of an array of which `read` gives any; one is on the host at a time, and replicas are read once.

    None has more than 1 / `pieces` of the last axis, which in a file of Hugging Face's is the first.
    """
    holders: dict[tuple, list[Any]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders[tuple(at.indices(size)[:2] for at, size in zip(index, shape))].append(device)
    step = -(-shape[-1] // pieces)
    for (*rest, (first, last)), devices in holders.items():
        for start in range(first, last, step):
            index = (*(slice(*bounds) for bounds in rest), slice(start, min(start + step, last)))
            part = read(index)
            for replica, device in enumerate(devices):
                yield Part(device, index, replica, jax.block_until_ready(jax.device_put(part, device)))
            del part  # or it would be there until the next is


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
        self._stacks: dict[str, dict[Any, jax.Array | np.ndarray]] = defaultdict(dict)  # by leaf and device

    def sharding(self, leaf: str) -> Any:
        """How one layer's leaf is to come."""
        return without_layers(self._shardings[leaf]) if self._stacked else self._shardings[leaf]

    def add(self, layer: int, leaf: str, parts: Iterable[Any], name: str) -> None:
        """Takes one leaf, `name` in messages.

        Raises:
          ValueError: if it is not finite.
        """
        if self._stacked:  # by map: a loop's name would hold a part until the next has come
            bad = sum(map(functools.partial(self._set, layer, leaf), parts))
            _require_none(name, bad, math.prod(self._shapes[leaf]))
        else:
            shards = [part.data for part in parts]
            array = jax.make_array_from_single_device_arrays(self._shapes[leaf], self._shardings[leaf], shards)
            require_finite(name, array)
            self._layers[layer][leaf] = array

    def _set(self, layer: int, leaf: str, part: Any) -> int:
        """Writes a part into the stack of its device. How many numbers are not finite; of replicas one counts."""
        shape, sharding, stacks = (self._num_layers, *self._shapes[leaf]), self._shardings[leaf], self._stacks[leaf]
        if part.device not in stacks:
            stacks[part.device] = _new_stack(sharding.shard_shape(shape), part.data.dtype, part.device)
        held = sharding.addressable_devices_indices_map(shape)[part.device]
        start = [(to.start or 0) - (own.start or 0) for to, own in zip((slice(layer, None), *part.index), held)]
        if start[0] in range(len(stacks[part.device])):
            stacks[part.device] = _set_part(stacks[part.device], part.data, start)
        return 0 if part.replica_id else _count_not_finite(part.data)

    def result(self) -> Any:
        """All that came."""
        if not self._stacked:
            return [make_params(layer) for layer in self._layers]
        stacks = {}
        for leaf, parts in self._stacks.items():
            sharding = self._shardings[leaf]
            shape = (self._num_layers, *self._shapes[leaf])
            arrays = [jax.device_put(stack, device, may_alias=True) for device, stack in parts.items()]
            stacks[leaf] = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
        return make_params(stacks)


def require_finite(name: str, array: Any) -> None:
    """Raises ValueError unless all of the array is finite."""
    _require_none(name, _count_not_finite(array), array.size)


def _require_none(name: str, bad: int, size: int) -> None:
    require(bad == 0, f"{name} is finite.", f"{bad} numbers that are not, of {size}", "find a sound copy.")


def _count_not_finite(array: Any) -> int:
    return 0 if _all_finite(array) else int((~jnp.isfinite(array)).sum())


@jax.jit
def _all_finite(array):
    return jnp.isfinite(array).all()


def _new_stack(shape: tuple[int, ...], dtype: Any, device: Any) -> jax.Array | np.ndarray:
    """Zeros on a device; for a CPU memory that takes no room before it is written, and that JAX then takes as it is."""
    if device.platform != "cpu":
        return jnp.zeros(shape, dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _set_part(stack: Any, part: jax.Array, start: Sequence[int]) -> Any:
    """`stack`, in whose place it is, with one layer's part."""
    if not isinstance(stack, np.ndarray):
        return jax.block_until_ready(_update(stack, part, start))
    at = tuple(slice(first, first + size) for first, size in zip(start, (1, *part.shape)))
    stack[at] = part
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _update(stack, part, start):
    return jax.lax.dynamic_update_slice(stack, part[None], start)  # in place, which stack.at[...].set is not
