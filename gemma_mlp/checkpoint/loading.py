"""Loads layers onto devices: one tensor at a time, and into stacks one part of a tensor at a time.

Besides the result, at most one tensor or part is in host memory. The loops `del` each part before reading the next, so
that two are never in memory.
"""

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
from gemma_mlp.dtypes import DTYPES, accumulation_dtype, compute_dtype, widest
from gemma_mlp.layouts.layout import Layout, Slot, locate
from gemma_mlp.layouts.trees import block_leaves, make_params
from gemma_mlp.params import MLPBlockParams

ALIGNMENT = 64  # bytes: JAX uses NumPy memory on a CPU without a copy if it is aligned so (XLA's MinAlign)
STACK_PARTS = 4  # parts in which a leaf is read into a stack
Progress = Callable[[Sequence[str]], Iterable[str]]
Index = tuple[slice, ...]  # in a leaf
Read = Callable[[Slot, Index], np.ndarray]


class Source(NamedTuple):
    """Layers of a checkpoint. Everything but their values has been checked."""

    layout: Layout
    tensors: Mapping[str, Any]  # by name, with shape and dtype
    slots: Mapping[int, Mapping[str, Slot]]  # by layer and leaf
    file: Callable[[str], Any]  # gives the file of a tensor, or the folder if its file is not known

    @classmethod
    def of(cls, layout: Layout, tensors: Mapping[str, Any], num_layers: int, layers: Sequence[int], file) -> "Source":
        slots = locate(layout, tensors, num_layers, layers, file, (*DTYPES, "float16"))
        return cls(layout, tensors, dict(zip(layers, slots)), file)

    def dtypes(self, dtype: Any) -> list[dict[str, jnp.dtype]]:
        """The dtype that each leaf of each layer is read in. Raises ValueError if one is not possible."""

        def of_slot(slot):
            own = self.tensors[slot.tensor].dtype
            require(
                dtype is not None or str(own) != "float16",
                f"{slot.tensor} in {self.file(slot.tensor)} must be of {', '.join(DTYPES)}, or be cast as it is read.",
                describe(self.tensors[slot.tensor]),
                'dtype="float32" keeps every number of it, dtype="bfloat16" rounds; float16 overflows on real weights.',
            )
            return compute_dtype(dtype or (accumulation_dtype(own) if slot.plus_one else own))

        return [{leaf: of_slot(slot) for leaf, slot in layer.items()} for layer in self.slots.values()]

    def shapes(self, dtype: Any) -> list[MLPBlockParams]:
        """The layers as `jax.ShapeDtypeStruct`s, cast to `dtype`; None: as stored."""
        shapes = self.layout.leaf_shapes
        return [
            make_params({leaf: jax.ShapeDtypeStruct(shapes[leaf], of_leaf) for leaf, of_leaf in layer.items()})
            for layer in self.dtypes(dtype)
        ]


def choose_layers(num_layers: int, layers: Sequence[int] | None) -> Sequence[int]:
    """The numbers of the chosen layers; None chooses all.

    Raises ValueError if there is no such layer, one is chosen twice, or none is chosen.
    """
    numbers = range(num_layers) if layers is None else [operator.index(layer) for layer in layers]
    require(
        len(numbers) > 0 and len(set(numbers)) == len(numbers) and all(0 <= number < num_layers for number in numbers),
        f"layers must name some of the layers 0 to {num_layers - 1}, each once.",
        str(list(numbers)),
        "check layers=.",
    )
    return numbers


def load(source: Source, read: Read, *, dtype: Any, shardings: Any, stacked: bool, progress: Progress | None) -> Any:
    """A list of layers, or one stack of them. `read` reads the part of a slot's leaf that an index selects.

    Raises ValueError if a tensor is not finite, or a dtype or sharding is not possible.
    """
    shapes = source.layout.leaf_shapes
    dtypes = source.dtypes(dtype)
    if stacked:  # layers of several dtypes take the widest, which rounds none of them
        dtypes = [{leaf: jnp.dtype(widest(*(layer[leaf] for layer in dtypes))) for leaf in shapes}] * len(dtypes)
    result = (_Stack if stacked else _List)(len(source.slots), shapes, shardings)
    by_tensor: dict[str, list[tuple[int, Slot]]] = {}  # so that leaves of one tensor are read one after the other
    for position, slots in enumerate(source.slots.values()):
        for slot in slots.values():
            by_tensor.setdefault(slot.tensor, []).append((position, slot))
    for name in progress(list(by_tensor)) if progress else by_tensor:
        for position, slot in by_tensor[name]:

            def read_part(index, slot=slot, dtype=dtypes[position][slot.leaf]):
                with np.errstate(over="ignore"):  # what the dtype cannot hold becomes an infinity, which is refused
                    return np.ascontiguousarray(read(slot, index), dtype)  # or JAX keeps a copy next to its array

            not_finite = result.add(position, slot.leaf, read_part)
            require_finite(f"{name} in {source.file(name)}", not_finite, math.prod(shapes[slot.leaf]))
    return result.params()


def leaf_shardings(shardings: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sharding of each leaf. Raises ValueError if the caller's are of another kind or do not divide the shapes."""
    if shardings is None or isinstance(shardings, jax.Device):
        device = shardings or jnp.zeros(()).device
        return dict.fromkeys(shapes, SingleDeviceSharding(device))
    require(
        isinstance(shardings, MLPBlockParams) and block_leaves(shardings).keys() == shapes.keys(),
        f"shardings must be a device, or an MLPBlockParams with one sharding for each of {', '.join(shapes)}.",
        describe(shardings),
        "gemma_mlp.layouts.make_params makes an MLPBlockParams from a dict.",
    )
    leaves = block_leaves(shardings)
    for name, shape in shapes.items():
        require(
            isinstance(leaves[name], NamedSharding | SingleDeviceSharding),
            "A sharding must be a NamedSharding or a SingleDeviceSharding.",
            f"{describe(leaves[name])} for {name}",
            "jax.NamedSharding(mesh, jax.P(...)).",
        )
        leaves[name].shard_shape(shape)  # raises if it does not divide the shape
    return leaves


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of a leaf, on one device."""

    index: Index
    data: jax.Array
    device: Any
    replica: int  # if several devices hold this part: 0 on the first, 1 on the second, ...


def read_parts(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: Any, count: int = 1
) -> Iterator[Part]:
    """Reads an array part by part. Each part is read once and put onto all devices that hold it.

    A part covers at most 1 / `count` of the last axis. That axis is the first one in Hugging Face's files, so a part
    is contiguous there.
    """
    holders: dict[tuple, list[Any]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders[tuple(at.indices(size)[:2] for at, size in zip(index, shape))].append(device)
    step = -(-shape[-1] // count)
    for (*rest, (first, last)), devices in holders.items():
        for start in range(first, last, step):
            index = (*(slice(*bounds) for bounds in rest), slice(start, min(start + step, last)))
            data = read(index)
            for replica, device in enumerate(devices):
                place = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
                yield Part(index, jax.block_until_ready(jax.device_put(data, place)), device, replica)
            del data


class _List:
    """Takes the leaves of layers in any order and gives a list of layers."""

    def __init__(self, num_layers: int, shapes: Mapping[str, tuple[int, ...]], shardings: Any):
        self._shapes, self._shardings = shapes, leaf_shardings(shardings, shapes)
        self._layers: list[dict[str, jax.Array]] = [{} for _ in range(num_layers)]

    def add(self, layer: int, leaf: str, read: Callable[[Index], np.ndarray]) -> int:
        """Takes one leaf. Returns how many of its numbers are not finite."""
        shape, sharding = self._shapes[leaf], self._shardings[leaf]
        shards = [part.data for part in read_parts(read, shape, sharding)]
        self._layers[layer][leaf] = jax.make_array_from_single_device_arrays(shape, sharding, shards)
        return count_not_finite(self._layers[layer][leaf])

    def params(self) -> list[MLPBlockParams]:
        return [make_params(layer) for layer in self._layers]


class _Stack:
    """Takes the leaves of layers in any order and gives one stack of layers."""

    def __init__(self, num_layers: int, shapes: Mapping[str, tuple[int, ...]], shardings: Any):
        self._shapes = {leaf: (num_layers, *shape) for leaf, shape in shapes.items()}
        self._shardings = leaf_shardings(shardings, self._shapes)
        self._stacks: dict[str, dict[Any, jax.Array | np.ndarray]] = defaultdict(dict)  # by leaf and device

    def add(self, layer: int, leaf: str, read: Callable[[Index], np.ndarray]) -> int:
        """Takes one leaf. Returns how many of its numbers are not finite."""
        sharding, not_finite = self._shardings[leaf], 0
        if isinstance(sharding, NamedSharding):  # that of one layer
            spec, memory_kind = PartitionSpec(*sharding.spec[1:]), sharding.memory_kind
            sharding = NamedSharding(sharding.mesh, spec, memory_kind=memory_kind)
        for part in read_parts(read, self._shapes[leaf][1:], sharding, STACK_PARTS):
            self._write(layer, leaf, part)
            not_finite += 0 if part.replica else count_not_finite(part.data)
            del part
        return not_finite

    def _write(self, layer: int, leaf: str, part: Part) -> None:
        """Writes a part into its device's shard of the stack, unless the layer lies in another device's shard."""
        shape, sharding, stacks = self._shapes[leaf], self._shardings[leaf], self._stacks[leaf]
        if part.device not in stacks:
            of_host = part.data.sharding.memory_kind != part.device.default_memory().kind
            make = _host_stack if of_host else functools.partial(_new_stack, device=part.device)
            stacks[part.device] = make(sharding.shard_shape(shape), part.data.dtype)
        stack = stacks[part.device]
        held = sharding.addressable_devices_indices_map(shape)[part.device]
        start = [(to.start or 0) - (own.start or 0) for to, own in zip((slice(layer, None), *part.index), held)]
        if start[0] not in range(len(stack)):
            return
        if isinstance(stack, np.ndarray):
            stack[tuple(slice(at, at + size) for at, size in zip(start, (1, *part.data.shape)))] = part.data
        else:
            stacks[part.device] = jax.block_until_ready(_overwrite(stack, part.data, start))

    def params(self) -> MLPBlockParams:
        stacks = {}
        for leaf, parts in self._stacks.items():
            shape, sharding = self._shapes[leaf], self._shardings[leaf]
            arrays = []
            for device in list(parts):
                place = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
                arrays.append(jax.device_put(parts.pop(device), place, may_alias=True))
            stacks[leaf] = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
        return make_params(stacks)


def _new_stack(shape: tuple[int, ...], dtype: Any, device: Any) -> jax.Array | np.ndarray:
    """Zeros on a device. For a CPU they are those of :func:`_host_stack`.

    JAX's zeros take the memory of the whole stack at once. With them, reading an Orbax checkpoint that has one chunk
    for each tensor would need twice as much besides the result.
    """
    return _host_stack(shape, dtype) if device.platform == "cpu" else jnp.zeros(shape, dtype, device=device)


def _host_stack(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """NumPy's zeros, which take no memory until they are written, where JAX on a CPU can use them without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


@functools.partial(jax.jit, donate_argnums=0)
def _overwrite(stack, part, start):
    """Writes a part of one layer into `stack` at `start`, in place. `stack.at[...].set` would copy the stack."""
    return jax.lax.dynamic_update_slice(stack, part[None], start)


@jax.jit
def _all_finite(array):
    return jnp.isfinite(array).all()


def count_not_finite(array: Any) -> int:
    """The number of infinities and NaNs in an array."""
    if isinstance(array, jax.Array):
        own = next(iter(array.sharding.device_set)).default_memory().kind
        if array.sharding.memory_kind != own:  # XLA computes in a device's own memory
            array = jax.device_put(array, array.sharding.with_memory_kind(own))
    # On a CPU, sum() takes four bytes for each number, all() only one. So sum only if some are not finite.
    return 0 if _all_finite(array) else int((~jnp.isfinite(array)).sum())


def require_finite(name: str, not_finite: int, size: int) -> None:
    rule, received = f"{name} must be finite.", f"{not_finite} numbers that are not, of {size}"
    require(not_finite == 0, rule, received, "find a sound copy, or read it in a wider dtype.")


def require_finite_layers(layers: Mapping[int, MLPBlockParams]) -> None:
    """Raises ValueError unless every leaf of the layers, which are given by number, is finite."""
    for number, layer in layers.items():
        for leaf, weight in block_leaves(layer).items():
            for array in jax.tree.leaves(weight):
                if jnp.issubdtype(array.dtype, jnp.floating):
                    require_finite(f"{leaf} of layer {number}", count_not_finite(array), array.size)
