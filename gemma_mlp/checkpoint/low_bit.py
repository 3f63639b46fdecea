"""Puts layers with quantised weights, which a reader decodes into NumPy arrays, onto devices, and checks them.

One weight at a time is decoded in host memory. For a stack, those of all layers wait there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma_mlp.checkpoint.loading import Progress, leaf_shardings, require_finite
from gemma_mlp.checks import describe, require
from gemma_mlp.dtypes import DTYPES, compute_dtype, widest
from gemma_mlp.layouts.trees import make_params
from gemma_mlp.params import LEAVES
from gemma_mlp.weights import QuantizedWeight, require_sound, scale_axes

Decode = Callable[[int, str], Any]  # (layer, leaf) -> a NumPy array or a QuantizedWeight of two


def place(
    decode: Decode,
    layers: Sequence[int],
    shapes: Mapping[str, tuple[int, ...]],
    where: Callable[[int, str], str],
    *,
    dtype: Any,
    shardings: Any,
    stacked: bool,
    progress: Progress | None,
) -> Any:
    """A list of `MLPBlockParams`, or one whose leaves are stacked.

    Args:
      decode: gives a leaf of a layer. float16 in it becomes float32, which keeps every number.
      layers: the numbers of the layers.
      shapes: of the leaves of a layer.
      where: names a leaf and its file, for errors.
      dtype, shardings, stacked, progress: as for :func:`read_huggingface`. A sharding is that of a weight's numbers;
        its scales are split alike, but not along the groups unless these lie along F.

    Raises:
      ValueError: if a leaf has another shape, scales do not fit their weight, or a number is not finite.
    """
    stack_shapes = {leaf: (len(layers), *shape) if stacked else shape for leaf, shape in shapes.items()}
    places = leaf_shardings(shardings, stack_shapes)

    def read(layer, leaf):
        weight, name = decode(layer, leaf), where(layer, leaf)
        rule, fix = f"{name} must be {list(shapes[leaf])}.", "check the config of the model that this file is of."
        require(tuple(weight.shape) == shapes[leaf], rule, describe(weight), fix)
        weight = _with_floats(lambda array: _cast(array, dtype, name), weight)
        require_sound(name, weight)
        arrays = [np.asarray(array) for array in jax.tree.leaves(weight)]
        not_finite = sum(int((~np.isfinite(array)).sum()) for array in arrays if array.dtype.kind not in "i")
        require_finite(name, not_finite, sum(array.size for array in arrays))
        return weight

    read_layers: list[dict[str, Any]] = [{} for _ in range(1 if stacked else len(layers))]
    names = [f"{leaf} of layer {layer}" for leaf in shapes for layer in layers]
    steps = iter(progress(names) if progress else names)
    for leaf in shapes:
        waiting = []
        for position, layer in enumerate(layers):
            next(steps, None)
            weight = read(layer, leaf)
            if stacked:
                waiting.append(weight)
            else:
                read_layers[position][leaf] = _put(weight, leaf, places[leaf])
        if stacked:
            read_layers[0][leaf] = _put(_stack(waiting, leaf), leaf, places[leaf])
    next(steps, None)
    made = [make_params(layer) for layer in read_layers]
    return made[0] if stacked else made


def _cast(array: Any, dtype: Any, name: str) -> np.ndarray:
    own = "float32" if array.dtype == np.float16 else array.dtype.name
    require(own in DTYPES, f"{name} must be of floating-point numbers.", describe(array), "convert it first.")
    with np.errstate(over="ignore"):  # what the dtype cannot hold becomes an infinity, which is refused
        return np.ascontiguousarray(array, compute_dtype(dtype or own))


def _with_floats(function: Callable[[Any], Any], weight: Any) -> Any:
    """`weight` with `function` of its scales, or of itself if it is an array."""
    if isinstance(weight, QuantizedWeight):
        return dataclasses.replace(weight, scale=function(weight.scale))
    return function(weight)


def _stack(weights: Sequence[Any], leaf: str) -> Any:
    """The weights on a new first axis. Dtypes of their floating-point numbers become the widest."""
    wide = jnp.dtype(widest(*(weight.dtype for weight in weights)))
    weights = [_with_floats(lambda array: array.astype(wide), weight) for weight in weights]
    kinds = {tuple((array.dtype.name, array.shape) for array in jax.tree.leaves(weight)) for weight in weights}
    received = " and ".join(sorted(str([f"{dtype}{list(shape)}" for dtype, shape in kind]) for kind in kinds))
    fix = "read a list, without stacked=True."
    require(len(kinds) == 1, f"A stack needs layers whose {leaf} is of one kind.", received, fix)
    return jax.tree.map(lambda *arrays: np.stack(arrays), *weights)


def _put(weight: Any, leaf: str, sharding: Any) -> Any:
    if not isinstance(weight, QuantizedWeight):
        return jax.device_put(weight, sharding)
    of_scale = sharding
    along_groups = scale_axes(LEAVES[leaf], weight.scale.shape[-2])[0] == "F"
    if isinstance(sharding, NamedSharding) and not along_groups:
        spec = [*sharding.spec, *(None,) * (weight.ndim - len(sharding.spec))]
        spec[-2] = None
        of_scale = NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
    of_scale.shard_shape(weight.scale.shape)  # raises if it does not divide the shape
    return QuantizedWeight(jax.device_put(weight.qvalue, sharding), jax.device_put(weight.scale, of_scale))
