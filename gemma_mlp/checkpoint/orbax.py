"""Orbax checkpoints in any layout: reads the block's parameters from them, and writes new ones."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from gemma_mlp.checkpoint.addresses import orbax_path
from gemma_mlp.checkpoint.loading import (
    Progress,
    Source,
    choose_layers,
    count_not_finite,
    load,
    require_finite,
    require_finite_layers,
)
from gemma_mlp.checkpoint.low_bit import place
from gemma_mlp.checks import require
from gemma_mlp.config import MLPConfig
from gemma_mlp.layouts.adapters import (
    DEEPMIND,
    Adapter,
    Adapters,
    adapters_from_deepmind,
    adapters_to_deepmind,
)
from gemma_mlp.layouts.layout import Layout, count_layers
from gemma_mlp.layouts.libraries import detect
from gemma_mlp.layouts.quantized import QuantizedTensor, as_weight, joined, shape_of
from gemma_mlp.layouts.trees import block_leaves, flatten, make_params, to_tree
from gemma_mlp.params import MLPBlockParams

CHUNK_BYTES = 2**22  # of a tensor that is written; whole chunks are read and unpacked for any part of a tensor
OPTIMIZER = {"opt_state", "param_states", "mu", "nu", "trace"}  # keys of train states: below them are no parameters


def read_orbax(
    path: str | Path,
    config: MLPConfig,
    *,
    layout: Layout | None = None,
    layers: Sequence[int] | None = None,
    dtype: Any = None,
    shardings: Any = None,
    stacked: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The block's parameters from an Orbax checkpoint. No other tensor is read.

    Besides the result, less than one tensor is in host memory if :func:`write_orbax` wrote the checkpoint. If Orbax
    itself did, up to two are. This folder's README says why.

    Args:
      path: on this disk or in gs://BUCKET. The folder that Orbax's checkpointers write, the folder of a step, or that
        of a CheckpointManager, whose latest step is then read.
      config: the block's sizes.
      layout: of the tree in the checkpoint; None: :func:`gemma_mlp.layouts.detect` tells it by the names, in which the
        state of an optimizer does not count. If a step has several items, names begin with that of the item.
      layers, dtype, shardings, stacked, progress: as for :func:`read_huggingface`.

    Returns:
      As :func:`read_huggingface`.

    Raises:
      ValueError: as :func:`read_huggingface`.
    """
    source = _source(orbax_path(path), config, layout, layers)
    options: Any = {"dtype": dtype, "shardings": shardings, "stacked": stacked, "progress": progress}
    # Leaves of one tensor are read one after the other.
    tensor = functools.lru_cache(1)(lambda name: _opened(source.file(name), name, source.tensors[name]))

    def read(slot, index=None):
        return slot.read(tensor(slot.tensor), index)

    if not _quantised(source):
        return load(source, read, **options)

    def decode(layer, leaf):
        slot = source.slots[layer][leaf]
        return as_weight(read(slot))

    def where(layer, leaf):
        name = source.slots[layer][leaf].tensor
        return f"{name} in {source.file(name)}"

    return place(decode, list(source.slots), source.layout.leaf_shapes, where, **options)


def read_orbax_adapters(path: str | Path) -> dict[int, dict[str, Adapter]]:
    """The adapters in an Orbax checkpoint of DeepMind's `gm.nn.LoRA`. No other tensor is read.

    Returns:
      As :func:`read_adapters`.

    Raises:
      ValueError: as `gemma_mlp.layouts.adapters_from_deepmind`, or if a number is not finite.
    """
    tensors, places = _tensors(orbax_path(path))
    wanted = [name for name in tensors if DEEPMIND.fullmatch(name) and not OPTIMIZER.intersection(name.split("/"))]
    tree = {name: jnp.asarray(_Tensor(places[name], name, tensors[name])[...]) for name in wanted}
    for name, array in tree.items():
        require_finite(f"{name} in {path}", count_not_finite(array), array.size)
    return adapters_from_deepmind(tree)


def orbax_shapes(
    path: str | Path, config: MLPConfig, *, layout: Layout | None = None, dtype: Any = None
) -> list[MLPBlockParams]:
    """The `jax.ShapeDtypeStruct`s of what :func:`read_orbax` reads. All is checked except the values."""
    source = _source(orbax_path(path), config, layout)
    dense = source.shapes(dtype)
    if not _quantised(source):
        return dense
    shapes = []
    for layer, slots in zip(dense, source.slots.values()):
        leaves = block_leaves(layer)
        for leaf, slot in slots.items():
            if isinstance(source.tensors[slot.tensor], QuantizedTensor):
                weight = slot.read(shape_of(source.tensors[slot.tensor])).weight()
                scale = jax.ShapeDtypeStruct(weight.scale.shape, dtype or weight.scale.dtype)
                leaves[leaf] = dataclasses.replace(weight, scale=scale)
        shapes.append(make_params(leaves))
    return shapes


def write_orbax(path: str | Path, params: Sequence[MLPBlockParams], layout: Layout) -> None:
    """Writes a new Orbax checkpoint of a library's tree. It appears whole or not at all, as Orbax ensures.

    Raises:
      ValueError: if the path exists, a number is not finite, or :func:`gemma_mlp.layouts.to_tree` raises it.
    """
    require_finite_layers(dict(enumerate(params)))
    _write(path, to_tree(params, layout))


def write_orbax_adapters(path: str | Path, adapters: Adapters, *, widen: bool = False) -> None:
    """Writes a new Orbax checkpoint of adapters, as the tree of DeepMind's `gm.nn.LoRA`.

    The arguments are those of `gemma_mlp.layouts.adapters_to_deepmind`.

    Raises:
      ValueError: as that function, or if the path exists or a number is not finite.
    """
    tree = adapters_to_deepmind(adapters, widen=widen)
    for name, array in flatten(tree).items():
        require_finite(name, count_not_finite(array), array.size)
    _write(path, tree)


def _write(path: str | Path, tree: Any) -> None:
    root = orbax_path(path)
    require(not root.exists(), "A checkpoint must be written to a new folder.", f"{root}, which exists", "use another.")
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(root, args=ocp.args.PyTreeSave(tree, save_args=chunked))


def _source(path: epath.Path, config: MLPConfig, layout: Layout | None, layers: Sequence[int] | None = None) -> Source:
    """Where the layers are."""
    tensors, places = _tensors(path)
    if layout is None:
        names = [name for name in tensors if not OPTIMIZER.intersection(name.split("/"))]
        received = f"only the state of an optimizer, such as {next(iter(tensors))}" if tensors else "no array"
        require(len(names) > 0, f"{path} must hold parameters.", received, "give the item that holds them.")
        layout = detect(names, config)
    num_layers = count_layers(layout, tensors)
    chosen = choose_layers(num_layers, layers)
    return Source.of(layout, tensors, num_layers, chosen, lambda name: places.get(name, path))


def _tensors(path: epath.Path) -> tuple[dict[str, Any], dict[str, epath.Path]]:
    """Shapes and dtypes by name, with the parts of quantised tensors joined; and the item that holds each."""
    items = _items(path)
    tensors: dict[str, Any] = {}
    places: dict[str, epath.Path] = {}
    for item in items:
        named = {}
        for name, tensor in flatten(_tree(item)).items():
            # Flax's `nnx.State` is stored with the key "value" below each variable.
            name = name.removesuffix("/value")
            named[name if len(items) == 1 else f"{item.name}/{name}"] = tensor
        tensors |= joined(named)
        places |= dict.fromkeys(joined(named), item)
    return tensors, places


def _items(path: epath.Path) -> list[epath.Path]:
    """The folders that hold arrays: `path` itself, or the items of a step, or those of the latest step of a manager."""

    def describes_arrays(folder):
        return (folder / "_METADATA").is_file()

    if describes_arrays(path) or not path.is_dir():
        return [path]
    # A step may have items with numbers in their names, which are no steps. Newer Orbax marks a step by a file.
    steps = [] if (path / "_CHECKPOINT_METADATA").is_file() else ocp.utils.checkpoint_steps_paths(path)
    if steps:
        return _items(max(steps, key=lambda step: ocp.utils.step_from_checkpoint_name(step.name)))
    return sorted(filter(describes_arrays, path.iterdir())) or [path]


def _tree(item: epath.Path) -> Any:
    """The tree of an item, with shapes and dtypes in place of arrays."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(item).item_metadata
        received = "no description of any array" if metadata is None else ""
    except Exception as error:  # Orbax does not document which
        metadata, received = None, repr(error)
    require(
        metadata is not None,
        f"{item} must be an Orbax checkpoint.",
        received,
        "give the folder of an item, of a step with items, or of a CheckpointManager with steps.",
    )
    return metadata.tree  # pyright: ignore[reportOptionalMemberAccess]


def _quantised(source: Source) -> bool:
    wanted = {slot.tensor for slots in source.slots.values() for slot in slots.values()}
    return any(isinstance(source.tensors[name], QuantizedTensor) for name in wanted)


def _opened(path: epath.Path, name: str, metadata: Any) -> Any:
    """A :class:`_Tensor`, or a QuantizedTensor of two."""
    if isinstance(metadata, QuantizedTensor):
        qvalue, scale = (_Tensor(path, name, part) for part in (metadata.qvalue, metadata.scale))
        return dataclasses.replace(metadata, qvalue=qvalue, scale=scale)
    return _Tensor(path, name, metadata)


class _Tensor:
    """A tensor in a checkpoint. TensorStore reads any part of it; Orbax itself restores whole tensors only."""

    def __init__(self, path: epath.Path, name: str, metadata: Any):
        self._where = f"{name} in {path}"
        self.shape, self.dtype = tuple(metadata.shape), metadata.dtype
        store: dict[str, Any] = {"driver": "file", "path": f"{path}/"}
        if str(path).startswith("gs://"):
            bucket, _, key = str(path).removeprefix("gs://").partition("/")
            store = {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
        if ocp.type_handlers.is_ocdbt_checkpoint(path):
            store = {"driver": "ocdbt", "base": store, "path": f"{metadata.name}/"}
        else:
            store["path"] += f"{metadata.name}/"
        # Parts of one chunk are read one after the other. With a cache of two chunks, each is unpacked only once.
        cache_bytes = 2 * math.prod(metadata.storage.chunk_shape) * metadata.dtype.itemsize
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        spec = {"driver": "auto", "kvstore": store}
        self._tensor = self._wait(tensorstore.open(spec, read=True, context=context))

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._wait(self._tensor[index].read())

    def _wait(self, future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:  # TensorStore does not document which
            raise ValueError(f"{self._where} must be whole. Got: {error!r}. Fix: save or copy it again.") from error
