"""Hugging Face folders of Gemma 1, 2 and 3: the config, and the block's parameters out of them and into them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_mlp.activations import Activation
from gemma_mlp.checkpoint import safetensors_folder
from gemma_mlp.checkpoint.loading import Part, Progress, Source, choose_layers, load, place, require_finite
from gemma_mlp.checks import describe, positive_int, require, require_choice
from gemma_mlp.config import MLPConfig
from gemma_mlp.layouts.libraries import huggingface
from gemma_mlp.layouts.trees import Slot, block_leaves, stored_tensors
from gemma_mlp.params import MLPBlockParams

# `hidden_activation` or `hidden_act` of a config.json: transformers' ACT2FN.
ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu", "relu": "relu"}
MODEL_TYPES = {"gemma": False, "gemma2": True, "gemma3_text": True}  # whether there is a norm after the MLP


class Model(NamedTuple):
    """What a config.json says."""

    config: MLPConfig
    num_layers: int


def read_config(folder: str | Path) -> Model:
    """Sizes and number of layers, from the config.json of a Hugging Face folder; Gemma 1, 2 or 3.

    `hidden_activation` counts before `hidden_act`. Gemma 1's "gelu" means the tanh form, as transformers reads it.

    Raises:
      ValueError: if the file is missing, of another model, or has a value that is not known.
    """
    path = Path(folder) / "config.json"
    values = safetensors_folder.read_json(path)
    if values.get("model_type") == "gemma3":  # with images; the language model is nested
        nested: Any = values.get("text_config")
        require(isinstance(nested, dict), f"{path} has a text_config.", describe(nested), "download it again.")
        values = {**nested, "model_type": "gemma3_text"}
    for name in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"):
        require(name in values, f"{path} has a {name}.", ", ".join(values) or "nothing", "download it again.")
    model_type: Any = values["model_type"]
    activation: Any = values.get("hidden_activation") or values.get("hidden_act")
    require_choice(f"model_type in {path}", model_type, MODEL_TYPES)
    require_choice(f"hidden_activation, or else hidden_act, in {path}", activation, ACTIVATIONS)
    if (model_type, activation) == ("gemma", "gelu"):
        activation = "gelu_pytorch_tanh"
    try:
        config = MLPConfig(
            values["hidden_size"],
            values["intermediate_size"],
            activation=ACTIVATIONS[activation],
            norm_eps=values["rms_norm_eps"],
            post_norm=MODEL_TYPES[model_type],
        )
        return Model(config, positive_int("num_hidden_layers", values["num_hidden_layers"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def huggingface_shapes(folder: str | Path, *, layers: Sequence[int] | None = None) -> list[MLPBlockParams]:
    """What :func:`read_huggingface` would read, as `jax.ShapeDtypeStruct`s; errors are its own but for values."""
    return _open(Path(folder), layers)[0].shapes()


def read_huggingface(
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = None,
    shardings: Any = None,
    stacked: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The block's parameters from a Hugging Face folder of Gemma 1, 2 or 3, reading no other tensor.

    Nothing is returned unless every tensor is there, has the shape that config.json says, and is finite. Beside the
    result, no more than one tensor is in memory.

    Args:
      folder: with config.json and safetensors, in one file or in shards with an index.
      layers: which, as [3] or range(2, 5); None: all.
      dtype: to cast to; None: as in the file.
      shardings: a device, or an `MLPBlockParams` of shardings, of the stacked leaves if `stacked`; None: the default
        device.
      stacked: whether to stack the layers on a leading axis, for scan.
      progress: wraps what is iterated over, tensor by tensor, as tqdm does.

    Returns:
      A list of `MLPBlockParams`, or one whose leaves are stacked.

    Raises:
      ValueError: naming the tensor, the file, what was expected and what came, before anything is returned.
    """
    source, files = _open(Path(folder), layers)

    def read(slot: Slot, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        # Opened for every part: what was read of a mapped file counts as this process's memory until it is closed.
        with safetensors_folder.opened(files[slot.tensor]) as file:
            part = slot.read(file.get_slice(slot.tensor), index)
        return np.ascontiguousarray(part, dtype)  # or JAX would make a copy of what is transposed, beside its own

    def fetch(slot: Slot, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Iterable[Part]:
        return place(lambda index: read(slot, index, dtype), shape, sharding, pieces=4 if stacked else 1)

    return load(source, fetch, dtype=dtype, shardings=shardings, stacked=stacked, progress=progress)


def update_huggingface(
    folder: str | Path, params: Sequence[MLPBlockParams], *, layers: Sequence[int] | None = None
) -> None:
    """Writes layers back into a Hugging Face folder; every other tensor and all metadata stay as they are.

    Cut short at any moment, the folder holds the old checkpoint or the new.

    Args:
      folder: as for :func:`read_huggingface`.
      params: of the layers, of the file's own dtype.
      layers: which; None: all.

    Raises:
      ValueError: as :func:`read_huggingface`, and if shapes or dtypes are not those of the file. Nothing is written
        then.
    """
    source, files = _open(Path(folder), layers)
    require(
        len(params) == len(source.slots),
        f"There are parameters for {len(source.slots)} layers.",
        f"for {len(params)}",
        "say which layers they are of with layers=.",
    )
    tensors = stored_tensors(dict(zip(source.slots, params)), source.layout)
    for number, layer in zip(source.slots, params):
        for leaf, array in block_leaves(layer).items():
            name = source.slots[number][leaf].tensor
            require(
                str(array.dtype) == source.tensors[name].dtype,
                f"{name} in {source.where(name)} is {source.tensors[name].dtype}.",
                describe(array),
                "cast the parameters: jax.tree.map(lambda leaf: leaf.astype(dtype), params).",
            )
            require_finite(f"{leaf} of layer {number}", array)
    safetensors_folder.update(
        Path(folder), files, {name: lambda make=make: np.asarray(make()) for name, make in tensors.items()}
    )


def write_huggingface(
    folder: str | Path,
    params: Sequence[MLPBlockParams],
    config: MLPConfig,
    *,
    shard_bytes: int = safetensors_folder.SHARD_BYTES,
) -> None:
    """Writes a new Hugging Face folder that holds the block's parameters and nothing else; whole or not at all.

    Args:
      folder: does not exist yet.
      params: of every layer, all of one dtype.
      config: of the block.
      shard_bytes: of tensors, in one file at most.

    Raises:
      ValueError: if the folder exists, or shapes are not those of the config.
    """
    model_type = "gemma2" if config.post_norm else "gemma"
    names = {activation: name for name, activation in ACTIVATIONS.items()}
    require(
        config.activation in names and (model_type, config.activation) != ("gemma", "gelu"),
        f"An activation that config.json can say is one of {', '.join(names)}, without gelu in Gemma 1.",
        config.activation,
        "write an Orbax checkpoint.",
    )
    tensors = stored_tensors(dict(enumerate(params)), huggingface(config))
    for number, layer in enumerate(params):
        for leaf, array in block_leaves(layer).items():
            require_finite(f"{leaf} of layer {number}", array)
    safetensors_folder.create(
        Path(folder),
        ((name, np.ascontiguousarray(make())) for name, make in tensors.items()),
        {
            "model_type": model_type,
            "hidden_size": config.embed_dim,
            "intermediate_size": config.hidden_dim,
            "num_hidden_layers": len(params),
            "hidden_activation": names[config.activation],
            "rms_norm_eps": config.norm_eps,
        },
        shard_bytes,
    )


def _open(folder: Path, layers: Sequence[int] | None) -> tuple[Source, Mapping[str, Path]]:
    """What the folder says of the layers, and the file of every tensor. Files of other layers are not opened."""
    config, num_layers = read_config(folder)
    files = safetensors_folder.list_files(folder)
    layout = huggingface(config, _prefix(files, folder))
    numbers = choose_layers(num_layers, layers)
    wanted = {layout.name(stored, number) for number in numbers for stored in layout.stored}
    tensors = {name: safetensors_folder.Header((), "of a file that is not needed") for name in files}
    for path in {files[name] for name in wanted if name in files}:
        headers = safetensors_folder.read_headers(path)
        for name in [name for name, file in files.items() if file == path]:
            del tensors[name]
            if name in headers:
                tensors[name] = headers[name]
    return Source.of(layout, tensors, num_layers, numbers, lambda name: str(files.get(name, folder))), files


def _prefix(names: Mapping[str, Any], folder: Path) -> str:
    """What comes before `layers.0`: "model.", or, where there are images, one of two longer ones."""
    pattern = re.compile(r"(.*\b|)layers\.\d+\.mlp\.(?:gate|up|down)_proj\.weight")
    prefixes = {match[1] for name in names if (match := pattern.fullmatch(name))}
    require(
        len(prefixes) <= 1,
        f"One model in {folder} has layers with an MLP of this kind.",
        f"{len(prefixes)}: {', '.join(sorted(prefixes))}",
        "keep one model to a folder.",
    )
    return prefixes.pop() if prefixes else "model."
