"""Reads, updates and writes the block's parameters in Hugging Face folders of Gemma and the models made from it."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma_mlp.activations import ACTIVATIONS
from gemma_mlp.checkpoint import safetensors_folder
from gemma_mlp.checkpoint.addresses import local_folder
from gemma_mlp.checkpoint.config_json import NAMES, read_kind
from gemma_mlp.checkpoint.loading import Progress, Source, choose_layers, load, require_finite_layers
from gemma_mlp.checks import describe, require
from gemma_mlp.config import MLPConfig
from gemma_mlp.layouts.libraries import huggingface
from gemma_mlp.layouts.trees import block_leaves, stored_tensors
from gemma_mlp.params import MLPBlockParams


def huggingface_shapes(folder: str | Path, *, part: str | None = None, dtype: Any = None) -> list[MLPBlockParams]:
    """The `jax.ShapeDtypeStruct`s of what :func:`read_huggingface` reads. All is checked except the values."""
    return _source(local_folder(folder), None, part).shapes(dtype)


def read_huggingface(
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    part: str | None = None,
    dtype: Any = None,
    shardings: Any = None,
    stacked: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The block's parameters from a Hugging Face folder of a Gemma. No other tensor is read.

    It returns only if every tensor is there, has the shape that config.json says, and is finite. Besides the result,
    at most one tensor is in memory.

    Args:
      folder: holds config.json and safetensors, in one file or in shards with an index. It must be on this disk: a URL
        or a name on the hub is refused.
      layers: the layers to read, such as [3] or range(2, 5); None: all.
      part: of a T5Gemma: "encoder" or "decoder"; None for all other models.
      dtype: to cast to, from any of bfloat16, float16, float32 and float64; None: as in the file, which must not be
        float16.
      shardings: a device, or an `MLPBlockParams` of shardings (of the stacked leaves if `stacked`); None: the default
        device.
      stacked: whether to stack the layers on a new first axis, for `jax.lax.scan`. Layers of several dtypes take the
        widest.
      progress: wraps the iteration over tensors, as tqdm does.

    Returns:
      A list of `MLPBlockParams`, or one whose leaves are stacked.

    Raises:
      ValueError: names the tensor, the file, what was expected and what was found.
    """
    source = _source(local_folder(folder), layers, part)

    def read(slot, index):
        return safetensors_folder.read_slot(source.file(slot.tensor), slot, index)

    return load(source, read, dtype=dtype, shardings=shardings, stacked=stacked, progress=progress)


def update_huggingface(
    folder: str | Path,
    params: Sequence[MLPBlockParams],
    *,
    layers: Sequence[int] | None = None,
    part: str | None = None,
) -> None:
    """Writes layers back into a Hugging Face folder. Every other tensor and all metadata stay as they are.

    If the update is interrupted at any moment, the folder holds the old checkpoint or the new one.

    Args:
      folder: as for :func:`read_huggingface`.
      params: of the layers, in the dtype of the file.
      layers: the layers to write; None: all.
      part: as for :func:`read_huggingface`.

    Raises:
      ValueError: as for :func:`read_huggingface`, or if shapes or dtypes are not those of the file. Then nothing is
        written.
    """
    folder = local_folder(folder)
    source = _source(folder, layers, part)
    require(
        len(params) == len(source.slots),
        f"params must have parameters for {len(source.slots)} layers.",
        f"parameters for {len(params)}",
        "choose the layers with layers=.",
    )
    numbered = dict(zip(source.slots, params))
    tensors = stored_tensors(numbered, source.layout)
    for number, layer in numbered.items():
        for leaf, array in block_leaves(layer).items():
            name = source.slots[number][leaf].tensor
            require(
                str(array.dtype) == source.tensors[name].dtype,
                f"{name} must be {source.tensors[name].dtype}, as in {source.file(name)}.",
                describe(array),
                "cast the parameters: jax.tree.map(lambda leaf: leaf.astype(dtype), params).",
            )
    require_finite_layers(numbered)
    safetensors_folder.update(folder, {name: source.file(name) for name in tensors}, tensors)


def write_huggingface(
    folder: str | Path,
    params: Sequence[MLPBlockParams],
    config: MLPConfig,
    *,
    shard_bytes: int = safetensors_folder.SHARD_BYTES,
) -> None:
    """Writes a new Hugging Face folder that holds only the block's parameters. It appears whole or not at all.

    Args:
      folder: must not exist yet.
      params: of every layer. Each leaf keeps its dtype.
      config: of the block.
      shard_bytes: a file holds at most this many bytes of tensors, unless it holds one tensor that is larger.

    Raises:
      ValueError: if the folder exists, a shape is not that of the config, a number is not finite, or config.json has
        no name for the activation.
    """
    folder = local_folder(folder, new=True)
    model_type = "gemma2" if config.post_norm else "gemma"
    activation = ACTIVATIONS[config.activation].huggingface
    require(
        activation is not None and (model_type, activation) != ("gemma", "gelu"),
        f"The activation must be one that config.json can name: {', '.join(NAMES.values())}, but not gelu in Gemma 1.",
        config.activation,
        "write an Orbax checkpoint.",
    )
    numbered = dict(enumerate(params))
    tensors = stored_tensors(numbered, huggingface(config))
    require_finite_layers(numbered)
    settings = {
        "model_type": model_type,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": len(params),
        "hidden_activation": activation,
        "rms_norm_eps": config.norm_eps,
    }
    safetensors_folder.create(folder, tensors, settings, shard_bytes)


def _source(folder: Path, layers: Sequence[int] | None, part: str | None) -> Source:
    """Where the layers are. It reads the headers of those files that hold them, and opens no other file."""
    kind, (config, num_layers) = read_kind(folder, part)
    files = safetensors_folder.list_files(folder)
    layout = huggingface(config, _prefix(files, folder, part), pre_norm=kind.pre_norm)
    numbers = choose_layers(num_layers, layers)
    wanted = {layout.name(stored, number) for number in numbers for stored in layout.stored}
    tensors = safetensors_folder.read_headers(files, wanted)
    try:
        return Source.of(layout, tensors, num_layers, numbers, lambda name: files.get(name, folder))
    except ValueError as error:
        values = safetensors_folder.read_json(folder / "config.json")
        quantised: Any = values.get("quantization_config", values.get("quantization"))  # that of transformers, of mlx
        if not isinstance(quantised, dict):
            raise
        said = ", ".join(f"{key} {value}" for key, value in quantised.items() if isinstance(value, str | int))
        fix = "dequantise them and save them, as dequantize() and save_pretrained() of transformers do."
        raise ValueError(f"{folder} must hold plain weights. Got: quantised ones, {said}. Fix: {fix}") from error


def _prefix(names: Iterable[str], folder: Path, part: str | None) -> str:
    """What stands before `layers.0`: "model.", or a longer prefix in models of several parts."""
    pattern = re.compile(r"(.*\b|)layers\.\d+\.mlp\.(?:gate|up|down)_proj\.weight")
    prefixes = {match[1] for name in names if (match := pattern.fullmatch(name))}
    prefixes = {prefix for prefix in prefixes if part is None or part in prefix.split(".")}
    require(
        len(prefixes) <= 1,
        f"{folder} must hold only one model that has layers with an MLP of this kind.",
        f"{len(prefixes)}: {', '.join(sorted(prefixes))}",
        "keep each model in a folder of its own.",
    )
    return prefixes.pop() if prefixes else f"model.{part}." if part else "model."
