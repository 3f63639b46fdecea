"""Orbax checkpoints of any layout: the block's parameters out of them, and new ones of them."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from gemma_mlp.checks import require_new
from gemma_mlp.config import MLPConfig
from gemma_mlp.dtypes import compute_dtype
from gemma_mlp.layouts import detect
from gemma_mlp.loading import Progress, Source, choose_layers, load, require_finite
from gemma_mlp.params import MLPBlockParams
from gemma_mlp.trees import LEAVES, Layout, Slot, block_leaves, count_layers, flatten, to_tree


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
    """The block's parameters from an Orbax checkpoint, restoring no other tensor.

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
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = _metadata(checkpointer, path)
        source = _open(path, tree, config, layout, layers)
        last: dict[str, jax.Array] = {}  # the tensor restored last, which may hold several leaves

        def fetch(slot: Slot, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Sequence[jax.Shard]:
            if slot.tensor not in last:
                last.clear()
                compute_dtype(source.tensors[slot.tensor].dtype)  # or JAX would narrow float64 without a word
                last[slot.tensor] = _restore(checkpointer, path, tree, slot, sharding)
            if slot.plus_one:  # whether it is exact is known from the values alone
                return jax.device_put(slot.read(last[slot.tensor]).astype(dtype), sharding).addressable_shards
            anonymous = dataclasses.replace(slot, tensor="")  # so that layers share one compilation
            return jax.block_until_ready(_reader(sharding)(last[slot.tensor], anonymous, dtype)).addressable_shards

        return load(source, fetch, dtype=dtype, shardings=shardings, stacked=stacked, progress=progress)


def orbax_shapes(
    path: str | Path, config: MLPConfig, *, layout: Layout | None = None, layers: Sequence[int] | None = None
) -> list[MLPBlockParams]:
    """What :func:`read_orbax` would read, as `jax.ShapeDtypeStruct`s; errors are its own but for values."""
    path = Path(path).absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        return _open(path, _metadata(checkpointer, path), config, layout, layers).shapes()


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
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, to_tree(params, layout))


def _open(path: Path, tree: Any, config: MLPConfig, layout: Layout | None, layers: Sequence[int] | None) -> Source:
    tensors = flatten(tree, "/")
    layout = layout or detect(tensors, config)
    num_layers = count_layers(layout, tensors)
    return Source.of(layout, tensors, num_layers, choose_layers(num_layers, layers), lambda name: str(path))


@functools.cache
def _reader(sharding: Any) -> Any:
    def read(tensor, slot, dtype):
        return slot.read(tensor).astype(dtype)

    return jax.jit(read, static_argnums=(1, 2), out_shardings=sharding)


def _metadata(checkpointer: ocp.PyTreeCheckpointer, path: Path) -> Any:
    """The checkpoint's tree, with shapes and dtypes in place of arrays."""
    try:
        metadata = checkpointer.metadata(path).item_metadata
        assert metadata is not None
        return metadata.tree
    except Exception as error:  # Orbax documents none
        raise ValueError(
            f"{path} is an Orbax checkpoint. Received: {error}. Fix: of a CheckpointManager, give the item in a step."
        ) from error


def _restore(checkpointer: ocp.PyTreeCheckpointer, path: Path, tree: Any, slot: Slot, sharding: Any) -> jax.Array:
    """The tensor of `slot`, spread as its leaf is to be, so that no device gets more of it than it keeps."""
    names, (leaves, treedef) = list(flatten(tree, "/")), jax.tree.flatten(tree)
    place = names.index(slot.tensor)
    if isinstance(sharding, NamedSharding):
        axes = dict(zip(LEAVES[slot.leaf], (*sharding.spec, None, None)))
        spec = (axes[at] if isinstance(at, str) else None for at in slot.at)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    wanted = jax.ShapeDtypeStruct(leaves[place].shape, leaves[place].dtype, sharding=sharding)
    item = jax.tree.unflatten(treedef, [wanted if i == place else ocp.PLACEHOLDER for i in range(len(leaves))])
    arguments = ocp.args.PyTreeRestore(item, ocp.checkpoint_utils.construct_restore_args(item))
    try:
        restored = checkpointer.restore(path, args=arguments)
    except Exception as error:  # Orbax documents none
        raise ValueError(f"{slot.tensor} in {path} is whole. Received: {error}. Fix: save or copy it again.") from error
    return jax.block_until_ready(flatten(restored, "/")[slot.tensor])
