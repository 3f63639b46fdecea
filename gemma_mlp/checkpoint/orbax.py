"""Orbax checkpoints of any layout: the block's parameters out of them, and new ones of them."""

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from gemma_mlp.checkpoint.loading import Part, Progress, Source, choose_layers, load, place, require_finite
from gemma_mlp.checks import require_new
from gemma_mlp.config import MLPConfig
from gemma_mlp.layouts import detect
from gemma_mlp.layouts.trees import Layout, Slot, block_leaves, count_layers, flatten, to_tree
from gemma_mlp.params import MLPBlockParams

CHUNK_BYTES = 2**22  # of a tensor that is written: as much is read and unpacked for any part of it


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
    """The block's parameters from an Orbax checkpoint, reading no other tensor.

    Beside the result, the parts of one tensor that are read next are in memory, and the chunks that they lie in, packed
    and unpacked: half a tensor at most of what :func:`write_orbax` wrote. Orbax by itself stores what one device held
    as one chunk, so that the host has up to two tensors; on a CPU less than one beside the result, whose last layer
    takes no memory before it is filled.

    Args:
      path: the folder that Orbax's checkpointers write; in a step of a CheckpointManager, the item in it.
      config: sizes.
      layout: of the tree in it; None: the one that its names tell (:func:`gemma_mlp.layouts.detect`).
      layers, dtype, shardings, stacked, progress: as for :func:`read_huggingface`.

    Returns:
      As :func:`read_huggingface`.

    Raises:
      ValueError: as :func:`read_huggingface`.
    """
    path = Path(path).absolute()
    tree = _metadata(path)
    source = _open(path, tree, config, layout, layers)

    @functools.lru_cache(1)  # leaves of one tensor come in a row
    def open_tensor(name: str) -> _Tensor:
        return _Tensor(path, name, source.tensors[name])

    def fetch(slot: Slot, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Iterable[Part]:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            return np.ascontiguousarray(slot.read(open_tensor(slot.tensor), index), dtype)

        return place(read, shape, sharding, pieces=4 if stacked else 1)

    return load(source, fetch, dtype=dtype, shardings=shardings, stacked=stacked, progress=progress)


def orbax_shapes(
    path: str | Path, config: MLPConfig, *, layout: Layout | None = None, layers: Sequence[int] | None = None
) -> list[MLPBlockParams]:
    """What :func:`read_orbax` would read, as `jax.ShapeDtypeStruct`s; errors are its own but for values."""
    path = Path(path).absolute()
    return _open(path, _metadata(path), config, layout, layers).shapes()


def write_orbax(path: str | Path, params: Sequence[MLPBlockParams], layout: Layout) -> None:
    """Writes a new Orbax checkpoint of a library's tree; whole or not at all, as Orbax does.

    Raises:
      ValueError: if the path exists, or :func:`gemma_mlp.layouts.to_tree` raises.
    """
    path = Path(path).absolute()
    require_new(path)
    for number, layer in enumerate(params):
        for leaf, array in block_leaves(layer).items():
            require_finite(f"{leaf} of layer {number}", array)
    tree = to_tree(params, layout)
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=chunked))


def _open(path: Path, tree: Any, config: MLPConfig, layout: Layout | None, layers: Sequence[int] | None) -> Source:
    tensors = flatten(tree, "/")
    layout = layout or detect(tensors, config)
    num_layers = count_layers(layout, tensors)
    return Source.of(layout, tensors, num_layers, choose_layers(num_layers, layers), lambda name: str(path))


def _metadata(path: Path) -> Any:
    """The checkpoint's tree, with shapes and dtypes in place of arrays."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
        assert metadata is not None
        return metadata.tree
    except Exception as error:  # Orbax documents none
        raise ValueError(
            f"{path} is an Orbax checkpoint. Received: {error}. Fix: of a CheckpointManager, give the item in a step."
        ) from error


class _Tensor:
    """A tensor in a checkpoint, of which any part can be read: Orbax restores whole ones, TensorStore reads parts."""

    def __init__(self, path: Path, name: str, metadata: Any):
        self._where = f"{name} in {path}"
        # Parts of one chunk are read one after the other: kept, it is decoded once.
        kept = 2 * math.prod(metadata.storage.chunk_shape) * metadata.dtype.itemsize
        folder = {"driver": "file", "path": f"{path}/"}
        if ocp.type_handlers.is_ocdbt_checkpoint(path):
            store = {"driver": "ocdbt", "base": folder, "path": f"{metadata.name}/"}
        else:
            store = {**folder, "path": f"{path}/{metadata.name}/"}
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": kept}})
        spec = {"driver": "auto", "kvstore": store}
        self._tensor = self._wait(tensorstore.open(spec, read=True, context=context))

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._wait(self._tensor[index].read())

    def _wait(self, future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:  # TensorStore documents none
            raise ValueError(f"{self._where} is whole. Received: {error}. Fix: save or copy it again.") from error
