"""Reads weights of few bits in Hugging Face folders that the library compressed-tensors has written.

config.json then has a quantization_config with quant_method "compressed-tensors". The tensors of a projection [N, K]:

    pack-quantized    weight_packed int32 [N, K * bits / 32], weight_scale [N, groups], weight_shape [2]
    the other formats weight int8 or float8_e4m3fn [N, K], weight_scale [N, groups]
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_mlp.checkpoint.low_bit import Decode
from gemma_mlp.checkpoint.safetensors_folder import read_json, read_tensor
from gemma_mlp.checks import describe, require, require_choice
from gemma_mlp.layouts.layout import Layout
from gemma_mlp.params import NORMS
from gemma_mlp.weights import QuantizedWeight

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
PACKED_BITS = (4, 8)  # an int32 holds eight or four numbers, the first in its lowest bits, each plus 2^(bits - 1)
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")  # these are passed over


def is_compressed(folder: Path) -> bool:
    """Whether config.json says that compressed-tensors wrote the folder.

    Raises:
      ValueError: if it says so, and the format is one whose weights cannot be read.
    """
    path = folder / "config.json"
    said: Any = read_json(path).get("quantization_config") if path.exists() else None
    if not isinstance(said, dict) or said.get("quant_method") != "compressed-tensors":
        return False
    require_choice(f"The format of quantization_config in {path}", said.get("format"), FORMATS)
    fix = "decompress it with compressed-tensors, and save the model."
    for key in ("transform_config", "sparsity_config"):
        value: Any = said.get(key) or {}
        received = f"{key} {value}"
        plain = isinstance(value, dict) and (not value or value.get("format") == "dense")
        require(plain, "Compressed weights must be neither transformed nor sparse.", received[:200], fix)
    return True


def decoder(files: Mapping[str, Path], folder: Path, layouts: Mapping[int, Layout]) -> Decode:
    """A function of a layer and a leaf that reads it: a NumPy array or a QuantizedWeight. `layouts` are by layer."""
    own: dict[str, set[str]] = {}  # the tensors of each module
    for name in files:
        module, _, last = name.rpartition(".")
        own.setdefault(module, set()).add(last)

    def decode(layer, leaf):
        name = tensor_name(layouts[layer], leaf, layer)
        module = name.removesuffix(".weight")
        read = functools.partial(_read, files, folder, module)
        return read("weight") if leaf in NORMS else _weight(own.get(module, set()), read, f"{module} in {folder}")

    return decode


def tensor_name(layout: Layout, leaf: str, layer: int) -> str:
    """The name of the dense tensor, which ends in `.weight`."""
    return next(layout.name(stored, layer) for stored in layout.stored if leaf in stored.leaves)


def _read(files: Mapping[str, Path], folder: Path, module: str, last: str) -> np.ndarray:
    name = f"{module}.{last}"
    fix = "check the files; some may be missing."
    require(name in files, f"{folder} must hold {name}.", "no such tensor", fix)
    return read_tensor(files[name], name)


def _weight(names: set[str], read: Callable[[str], np.ndarray], where: str) -> Any:
    """A projection from its tensors [N, ...] as a weight [K, N]."""
    strange = sorted(names - {"weight", "weight_packed", "weight_scale", "weight_shape", *OF_ACTIVATIONS})
    require(
        not strange,
        f"{where} must have symmetric weights in the order of their columns: weight or weight_packed, weight_scale.",
        ", ".join(strange),
        "decompress it with compressed-tensors, and save the model.",
    )
    if "weight_packed" in names:
        values = _unpacked(read("weight_packed"), read("weight_shape"), where)
    else:
        values = read("weight")
        is_float = values.dtype.name in ("bfloat16", "float16", "float32", "float64")
        rule = f"{where} must have a weight of few bits with weight_scale, or a plain weight without."
        received = f"weight {describe(values)} {'with' if 'weight_scale' in names else 'without'} weight_scale"
        require(is_float != ("weight_scale" in names), rule, received, "save the model compressed.")
        if is_float:
            return values.T
    scale = read("weight_scale")
    if scale.size == 1:  # one for the whole tensor
        scale = np.broadcast_to(scale.reshape(1, 1), (len(values), 1))
    return QuantizedWeight(np.ascontiguousarray(values.T), np.ascontiguousarray(scale.T))  # pyright: ignore[reportArgumentType]


def _unpacked(packed: np.ndarray, shape: np.ndarray, where: str) -> np.ndarray:
    sizes = [int(size) for size in np.ravel(shape)]
    fits = [bits for bits in PACKED_BITS if len(sizes) == 2 and packed.shape == (sizes[0], -(-sizes[1] * bits // 32))]
    require(
        len(fits) == 1 and packed.dtype == np.int32,
        f"{where} must have weight_packed int32 [N, K * bits / 32], where bits is 4 or 8 and weight_shape is [N, K].",
        f"weight_packed {describe(packed)}, weight_shape {sizes}",
        "decompress weights of other widths with compressed-tensors, and save the model.",
    )
    octets = np.ascontiguousarray(packed).astype("<i4").view(np.uint8)
    if fits == [8]:
        return (octets[:, : sizes[1]] ^ 128).view(np.int8)
    halves = np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)[:, : sizes[1]]
    return (halves.view(np.int8) - np.int8(8)).astype(ml_dtypes.int4)
