"""Reads, updates and writes the block's parameters in Hugging Face folders of Gemma and the models made from it."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma_mlp.activations import ACTIVATIONS
from gemma_mlp.checkpoint import compressed, safetensors_folder
from gemma_mlp.checkpoint.addresses import local_folder
from gemma_mlp.checkpoint.config_json import NAMES, read_kind, require_block
from gemma_mlp.checkpoint.loading import Progress, Source, choose_layers, load, require_finite_layers
from gemma_mlp.checkpoint.low_bit import place
from gemma_mlp.checks import describe, require
from gemma_mlp.config import MLPConfig
from gemma_mlp.disk import locked
from gemma_mlp.layouts.layout import Layout
from gemma_mlp.layouts.libraries import huggingface
from gemma_mlp.layouts.trees import block_leaves, stored_tensors
from gemma_mlp.params import MLPBlockParams

MODEL_TYPES = {(True, True): "gemma2", (False, True): "gemma", (True, False): "gemma4_text"}  # of a new folder


def huggingface_shapes(
    folder: str | Path, *, part: str | None = None, dtype: Any = None, allow_activation_sparsity: bool = False
) -> list[MLPBlockParams]:
    """The `jax.ShapeDtypeStruct`s of what :func:`read_huggingface` reads. All is checked except the values."""
    sources = _sources(local_folder(folder), None, part, allow_activation_sparsity)
    return _in_order(sources, None, lambda source: source.shapes(dtype))


def read_huggingface(
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    part: str | None = None,
    dtype: Any = None,
    shardings: Any = None,
    stacked: bool = False,
    allow_activation_sparsity: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The block's parameters from a Hugging Face folder of a Gemma. No other tensor is read.

    It returns only if every tensor is there, has the shape that config.json says, and is finite. Besides the result,
    at most one tensor is in memory. Weights of few bits, as compressed-tensors writes them, come as
    `gemma_mlp.QuantizedWeight`s. This folder's README says which are read, and what they need while they are decoded.

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
      allow_activation_sparsity: whether to read layers whose gate has a threshold too, the first ten of Gemma 3n.
        :func:`gemma_mlp.mlp_block` does not compute them. This folder's README has the function that does.
      progress: wraps the iteration over tensors, as tqdm does; of each width in turn, if layers differ.

    Returns:
      A list of `MLPBlockParams`, or one whose leaves are stacked.

    Raises:
      ValueError: names the tensor, the file, what was expected and what was found.
    """
    folder, layers = local_folder(folder), None if layers is None else list(layers)
    options: Any = {"dtype": dtype, "shardings": shardings, "stacked": stacked, "progress": progress}
    if compressed.is_compressed(folder):
        return _read_compressed(folder, layers, part, allow_activation_sparsity, options)
    sources = _sources(folder, layers, part, allow_activation_sparsity)
    _require_one_width(stacked, [source.layout for source in sources])

    def read(source):
        def read_part(slot, index):
            return safetensors_folder.read_slot(source.file(slot.tensor), slot, index)

        return load(source, read_part, **options)

    return read(sources[0]) if stacked else _in_order(sources, layers, read)


def _read_compressed(
    folder: Path, layers: Sequence[int] | None, part: str | None, allow_sparsity: bool, options: dict[str, Any]
) -> Any:
    """The block's parameters from a folder of compressed-tensors."""
    files, num_layers, groups = _layouts(folder, layers, part, allow_sparsity)
    _require_one_width(options["stacked"], [layout for layout, _ in groups])
    by_layer = {number: layout for layout, own in groups for number in own}
    decode = compressed.decoder(files, folder, by_layer)

    def read(layout, own):
        def where(layer, leaf):
            name = compressed.tensor_name(layout, leaf, layer)
            return f"{name} in {files.get(name, files.get(f'{name}_packed', folder))}"

        return place(decode, own, layout.leaf_shapes, where, **options)

    if options["stacked"]:
        return read(*groups[0])
    found = {number: params for layout, own in groups for number, params in zip(own, read(layout, own))}
    return [found[number] for number in choose_layers(num_layers, layers)]


def _require_one_width(stacked: bool, layouts: Sequence[Layout]) -> None:
    widths = [layout.config.hidden_dim for layout in layouts]
    fix = "choose layers of one width with layers=, or read a list."
    require(not stacked or len(widths) == 1, "A stack needs layers of one width.", f"hidden_dim {widths}", fix)


def update_huggingface(
    folder: str | Path,
    params: Sequence[MLPBlockParams],
    *,
    layers: Sequence[int] | None = None,
    part: str | None = None,
    allow_activation_sparsity: bool = False,
) -> None:
    """Writes layers back into a Hugging Face folder. Every other tensor and all metadata stay as they are.

    If the update is interrupted at any moment, the folder holds the old checkpoint or the new one. Files that a killed
    update has left are removed first, unless the file system has no locks to tell them from those of another update.

    Args:
      folder: as for :func:`read_huggingface`.
      params: of the layers, in the dtype of the file.
      layers: the layers to write; None: all.
      part, allow_activation_sparsity: as for :func:`read_huggingface`.

    Raises:
      ValueError: as for :func:`read_huggingface`, or if shapes or dtypes are not those of the file. Then nothing is
        written.
    """
    folder, layers = local_folder(folder), None if layers is None else list(layers)
    with locked(folder) as alone:
        sources = _sources(folder, layers, part, allow_activation_sparsity)
        tensors = _tensors_of_update(sources, params, layers)
        files = {name: sources[0].file(name) for name in tensors}
        safetensors_folder.update(folder, files, tensors, tidy=alone)


def _tensors_of_update(sources, params, layers) -> dict[str, Callable[[], Any]]:
    """What makes each tensor of the files anew, after all checks."""
    numbers = _in_order(sources, layers, lambda source: source.slots)
    require(
        len(params) == len(numbers),
        f"params must have parameters for {len(numbers)} layers.",
        f"parameters for {len(params)}",
        "choose the layers with layers=.",
    )
    numbered = dict(zip(numbers, params))
    tensors: dict[str, Callable[[], Any]] = {}
    for source in sources:
        tensors |= stored_tensors({number: numbered[number] for number in source.slots}, source.layout)
        for number, slots in source.slots.items():
            for leaf, array in block_leaves(numbered[number]).items():
                name = slots[leaf].tensor
                dtype = source.tensors[name].dtype
                require(
                    str(array.dtype) == dtype,
                    f"{name} must be {dtype}, as in {source.file(name)}.",
                    describe(array),
                    "cast the parameters: jax.tree.map(lambda leaf: leaf.astype(dtype), params).",
                )
    require_finite_layers(numbered)
    return tensors


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
    model_type = MODEL_TYPES.get((config.post_norm, config.scale_plus_one))
    require(
        model_type is not None,
        "A config.json must have a model_type for the block. Where norms multiply by w, there are two norms.",
        "scale_plus_one=False without post_norm",
        "write an Orbax checkpoint.",
    )
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


def _sources(folder: Path, layers: Sequence[int] | None, part: str | None, allow_sparsity: bool) -> list[Source]:
    """Where the layers are, those of one config together. It reads the headers of their files and opens no other."""
    files, num_layers, pairs = _layouts(folder, layers, part, allow_sparsity)
    wanted = {layout.name(stored, number) for layout, own in pairs for number in own for stored in layout.stored}
    tensors = safetensors_folder.read_headers(files, wanted)
    try:
        return [
            Source.of(layout, tensors, num_layers, own, lambda name: files.get(name, folder)) for layout, own in pairs
        ]
    except ValueError as error:
        values = safetensors_folder.read_json(folder / "config.json")
        quantised: Any = values.get("quantization_config", values.get("quantization"))  # that of transformers, of mlx
        if not isinstance(quantised, dict):
            raise
        said = ", ".join(f"{key} {value}" for key, value in quantised.items() if isinstance(value, str | int))
        fix = "dequantise them and save them, as dequantize() and save_pretrained() of transformers do."
        if quantised.get("quant_method") == "compressed-tensors":
            fix = "read_huggingface reads these, but they cannot be updated."
        raise ValueError(f"{folder} must hold plain weights. Got: quantised ones, {said}. Fix: {fix}") from error


def _layouts(
    folder: Path, layers: Sequence[int] | None, part: str | None, allow_sparsity: bool
) -> tuple[dict[str, Path], int, list[tuple[Layout, list[int]]]]:
    """The files of all tensors, the number of layers, and for each config the layout and the chosen layers of it."""
    kind, configs = read_kind(folder, part, allow_sparsity)
    files = safetensors_folder.list_files(folder)
    prefix = _prefix(files, folder, part)
    numbers: dict[MLPConfig, list[int]] = {}
    for number in choose_layers(len(configs), layers):
        numbers.setdefault(require_block(configs, number), []).append(number)
    pairs = [(huggingface(config, prefix, pre_norm=kind.pre_norm), own) for config, own in numbers.items()]
    return files, len(configs), pairs


def _in_order(sources: Sequence[Source], layers: Sequence[int] | None, read: Callable[[Source], Iterable]) -> list:
    """What `read` gives for each layer of the sources, in the order of `layers`, or by number."""
    by_number = {number: layer for source in sources for number, layer in zip(source.slots, read(source))}
    return [by_number[number] for number in (sorted(by_number) if layers is None else layers)]


def _prefix(names: Iterable[str], folder: Path, part: str | None) -> str:
    """What stands before `layers.0`: "model.", or a longer prefix in models of several parts."""
    pattern = re.compile(r"(.*\b|)layers\.\d+\.mlp\.(?:gate|up|down)_proj\.weight(?:_packed)?")
    prefixes = {match[1] for name in names if (match := pattern.fullmatch(name))}
    prefixes = {prefix for prefix in prefixes if part is None or part in prefix.split(".")}
    require(
        len(prefixes) <= 1,
        f"{folder} must hold only one model that has layers with an MLP of this kind.",
        f"{len(prefixes)}: {', '.join(sorted(prefixes))}",
        "keep each model in a folder of its own.",
    )
    return prefixes.pop() if prefixes else f"model.{part}." if part else "model."
