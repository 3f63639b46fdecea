"""Rounds dense weights to few bits, and back."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from gemma_mlp.checks import describe, positive_int, require, require_choice
from gemma_mlp.dtypes import DTYPES, dtype_name
from gemma_mlp.weights import WEIGHT_DTYPES, WEIGHTS, LoRAWeight, QuantizedWeight, dense, known_weight, map_weights


def quantize(params: Any, dtype: Any, group_size: int | None = None) -> Any:
    """`params` with `gate_proj`, `up_proj` and `down_proj` in few bits, each as a `gemma_mlp.QuantizedWeight`.

    The rounding is that of `qwix.quantize`, symmetric and by the largest magnitude. The `quantize` extra has it.

        scale = max |W| / largest, over an output channel or each of its groups; largest = 127.5, 7.5 or 448
        qvalue = round(W / scale), in int8, int4 or float8_e4m3fn

    int8 takes half the memory of bfloat16, int4 a quarter. A group of 32 has one scale in the weight's own dtype, so in
    bfloat16 half a bit more for each number.

    Args:
      params: an `MLPParams`, an `MLPBlockParams`, the params of a Linen module, or a tree of these; stacks of layers
        [L, in, out] too. (For NNX modules there is `gemma_mlp.nnx.quantize`.) The base of an adapter is quantised, too.
      dtype: `int8`, `int4` or `float8_e4m3fn`.
      group_size: how many numbers along the contracted axis (the weight's first) share a scale, such as 32. None: all.

    Returns:
      The same tree with other weights. Biases, norms and adapters are as they were.

    Raises:
      ValueError: for another dtype, a group size that does not divide both D and F, weights that are quantised already,
        or a tree without weights of these names.
      ImportError: if qwix is not installed.
    """
    name = _dtype_name(dtype)
    if group_size is not None:
        group_size = positive_int("group_size", group_size)
    return map_weights(lambda weight: quantized(known_weight(weight), name, group_size), params, WEIGHTS)


def dequantize(params: Any, dtype: Any = None) -> Any:
    """`params` with dense weights in place of quantised ones: qvalue * scale, rounded once.

    Args:
      params: as for :func:`quantize`. The base of an adapter is dequantised, too. Dense weights stay as they are.
      dtype: of the dense weights; None: that of the scales.

    Raises:
      ValueError: for a dtype that is not supported, or a tree without weights of these names.
    """
    name = None if dtype is None else dtype_name("dtype", dtype)

    def dequantized(weight):
        weight = known_weight(weight)
        if isinstance(weight, LoRAWeight):
            return dataclasses.replace(weight, base=dequantized(weight.base))
        return dense(weight, name) if isinstance(weight, QuantizedWeight) else weight

    return map_weights(dequantized, params, WEIGHTS)


def _dtype_name(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name if dtype is not None else "None"
    except TypeError:
        name = repr(dtype)
    require_choice("dtype", name, WEIGHT_DTYPES)
    return name


def quantized(weight: Any, dtype: str, group_size: int | None) -> Any:
    """One weight of :func:`quantize`."""
    if isinstance(weight, LoRAWeight):
        return dataclasses.replace(weight, base=quantized(weight.base, dtype, group_size))
    require(
        not hasattr(weight, "qvalue")
        and getattr(weight, "ndim", 0) >= 2
        and getattr(weight, "dtype", jnp.dtype(bool)).name in DTYPES,
        f"A weight to quantise must be an array [in, out] in one of {', '.join(DTYPES)}.",
        describe(weight),
        "dequantize it first, if it is quantised already.",
    )
    contracted = weight.ndim - 2
    require(
        group_size is None or weight.shape[contracted] % group_size == 0,
        "group_size must divide the contracted axis: D for gate_proj and up_proj, F for down_proj.",
        f"group_size {group_size}, weight {describe(weight)}",
        "choose a divisor of both, such as 32.",
    )
    try:
        import qwix
    except ImportError as error:
        raise ImportError("gemma_mlp.quantize needs qwix. Fix: pip install 'gemma-mlp[quantize]'.") from error
    channels = tuple(axis for axis in range(weight.ndim) if axis != contracted)
    tiles = {contracted: group_size or weight.shape[contracted]}
    return known_weight(qwix.quantize(weight, dtype, channelwise_axes=channels, tiled_axes=tiles))
