"""Reads the block's parameters from GGUF files of Gemma 1, 2 and 3, the format of llama.cpp."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_mlp.checkpoint.addresses import local_folder
from gemma_mlp.checkpoint.config_json import Model
from gemma_mlp.checkpoint.loading import Progress, choose_layers
from gemma_mlp.checkpoint.low_bit import place
from gemma_mlp.checks import positive_int, require, require_choice
from gemma_mlp.config import MLPConfig
from gemma_mlp.layouts.arrays import add_exactly
from gemma_mlp.layouts.libraries import gemma_mlp
from gemma_mlp.params import NORMS
from gemma_mlp.weights import QuantizedWeight

# Whether a model has a norm after the MLP. llama.cpp's converter stores the norms of all of these as 1 + w.
POST_NORM = {"gemma": False, "gemma2": True, "gemma3": True, "gemma-embedding": True}
NAMES = {  # of the block's tensors, within blk.{layer}.
    "pre_norm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "post_norm": "post_ffw_norm",
}
SIZES = ("embedding_length", "feed_forward_length", "block_count")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")  # of tensors, in GGML's words
GROUP = 32  # numbers in a block of Q8_0 or Q4_0, along the contracted axis


def read_gguf_config(path: str | Path) -> Model:
    """The block's config and the number of layers, from the metadata of a GGUF file.

    Raises:
      ValueError: if the file is not whole, or of another model than Gemma 1, 2, 3 and EmbeddingGemma.
    """
    return _model(_open(path), path)


def read_gguf(
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    dtype: Any = None,
    shardings: Any = None,
    stacked: bool = False,
    round_norms: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The block's parameters from a GGUF file of a Gemma 1, 2 or 3. The `gguf` extra reads the file.

    Q4_0 and Q8_0 come as a `gemma_mlp.QuantizedWeight` of int4 or int8 with a scale for each 32 numbers along the
    contracted axis. `gemma_mlp.dequantize` then gives the numbers of llama.cpp, bit for bit. F32, F16 and BF16 come as
    arrays. float16, that of scales too, becomes float32, which keeps every number of it.

    Args:
      path: of the file, on this disk.
      dtype: of arrays and scales; None: as in the file. bfloat16 rounds the scales.
      round_norms: True: round a norm whose w cannot be recovered from the 1 + w in the file. False: refuse it.
      layers, shardings, stacked, progress: as for :func:`read_huggingface`.

    Returns:
      As :func:`read_huggingface`.

    Raises:
      ValueError: as for :func:`read_gguf_config`; if a tensor is missing, not finite, or of another type or shape.
      ImportError: if gguf is not installed.
    """
    reader = _open(path)
    config, num_layers = _model(reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def decode(layer, leaf):
        name = f"blk.{layer}.{NAMES[leaf]}.weight"
        fix = "check that the file is of the whole model."
        require(name in tensors, f"{path} must hold {name}.", f"{len(tensors)} others", fix)
        tensor = tensors[name]
        allowed = TYPES[:1] if leaf in NORMS else TYPES
        fix = "convert the original model with llama.cpp's convert_hf_to_gguf.py --outtype q8_0, bf16 or f16."
        kind = tensor.tensor_type.name
        require(kind in allowed, f"{name} in {path} must be of GGML's type {', '.join(allowed)}.", kind, fix)
        if leaf in NORMS:
            return add_exactly(np.asarray(tensor.data), -1, f"{name} in {path}", round_norms)
        return _weight(np.asarray(tensor.data), kind)

    return place(
        decode,
        choose_layers(num_layers, layers),
        gemma_mlp(config).leaf_shapes,
        lambda layer, leaf: f"blk.{layer}.{NAMES[leaf]}.weight in {path}",
        dtype=dtype,
        shardings=shardings,
        stacked=stacked,
        progress=progress,
    )


def _open(path: str | Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the library gguf. Fix: pip install 'gemma-mlp[gguf]'.") from error
    file = local_folder(path)
    require(file.is_file(), "A GGUF file must be a file on this disk.", f"{str(path)!r}", "give the .gguf file itself.")
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # gguf does not document which
        rule = f"{path} must be a whole GGUF file."
        raise ValueError(f"{rule} Got: {error!r}. Fix: download it again; it may be cut short.") from error
    fix = "convert it for little-endian machines with gguf-convert-endian."
    require(reader.byte_order == "I", f"{path} must be in this machine's byte order.", "the other one", fix)
    return reader


def _model(reader: Any, path: str | Path) -> Model:
    def value(key):
        field = reader.get_field(key)
        fix = "give the file of the whole model; the first of several parts has the metadata."
        require(field is not None, f"{path} must have {key}.", "no such field", fix)
        return field.contents()

    name = value("general.architecture")
    require_choice(f"general.architecture in {path}", name, POST_NORM)
    parts = reader.get_field("split.count")
    count = 1 if parts is None else parts.contents()
    fix = "join them with llama.cpp's llama-gguf-split --merge."
    require(count <= 1, f"{path} must be the only file of its model.", f"one of {count} parts", fix)
    sizes = {key: positive_int(f"{name}.{key} in {path}", value(f"{name}.{key}")) for key in SIZES}
    eps = value(f"{name}.attention.layer_norm_rms_epsilon")
    embed_dim, hidden_dim, num_layers = sizes.values()
    # The file has eps as a float32. It stands for the shortest decimal number of that float32.
    return Model(
        MLPConfig(embed_dim, hidden_dim, norm_eps=float(str(np.float32(eps))), post_norm=POST_NORM[name]), num_layers
    )


def _weight(data: np.ndarray, kind: str) -> Any:
    """A tensor [out, in] of a file as a weight [in, out]. A block has its scale d in two bytes, then its numbers."""
    if kind in ("F32", "F16"):
        return data.T
    if kind == "BF16":
        return data.view(ml_dtypes.bfloat16).T
    blocks = data.reshape(data.shape[0], -1, 2 + (GROUP if kind == "Q8_0" else GROUP // 2))
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    packed = blocks[..., 2:]
    if kind == "Q8_0":
        values = packed.view(np.int8)
    else:  # the first 16 numbers are the low halves of the bytes, the last 16 the high halves
        values = (np.concatenate([packed & 15, packed >> 4], axis=-1).view(np.int8) - np.int8(8)).astype(ml_dtypes.int4)
    return QuantizedWeight(np.ascontiguousarray(values.reshape(data.shape[0], -1).T), np.ascontiguousarray(scale.T))  # pyright: ignore[reportArgumentType]
