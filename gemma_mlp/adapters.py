"""LoRA adapters on plain parameters: made, merged into the weights, removed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from gemma_mlp.checks import require
from gemma_mlp.config import LoRA
from gemma_mlp.quantization import quantized
from gemma_mlp.weights import (
    WEIGHTS,
    LoRAWeight,
    QuantizedWeight,
    base_of,
    dense,
    known_weight,
    map_weights,
    scales_per_channel,
)


def add_lora(params: Any, lora: LoRA, key: Key[Array, ""]) -> Any:
    """`params` with an adapter on each weight of `lora.projections`: a `gemma_mlp.LoRAWeight` in place of the weight.

    The result computes what `params` does until it is trained: lora_a is drawn (He uniform, as in Flax and qwix),
    lora_b is zero. Both get the weight's dtype.

    Args:
      params: an `MLPParams`, an `MLPBlockParams`, or a tree of these; stacks of layers [L, in, out] too. Weights may be
        dense or quantised. (For NNX modules there is `gemma_mlp.nnx.add_lora`; Linen takes adapters from its config.)
      lora: rank, factor and projections.
      key: draws lora_a.

    Raises:
      ValueError: if a weight has an adapter already, or the tree has no weights of these names.
    """
    count = 0

    def adapted(weight):
        nonlocal count
        weight = known_weight(weight)
        require(
            not isinstance(weight, LoRAWeight),
            "A weight can have one adapter.",
            "a weight with an adapter",
            "call merge_lora or remove_lora first.",
        )
        count += 1
        *lead, contracted, output = weight.shape
        make_a = jax.nn.initializers.he_uniform(batch_axis=tuple(range(len(lead))))
        lora_a = make_a(jax.random.fold_in(key, count), (*lead, contracted, lora.rank), weight.dtype)
        return LoRAWeight(weight, lora_a, jnp.zeros((*lead, lora.rank, output), weight.dtype), lora.factor)

    return map_weights(adapted, params, lora.projections)


def merge_lora(params: Any) -> Any:
    """`params` with base + factor * lora_a @ lora_b in place of each adapted weight, in the base's dtype.

    The sum is computed in float32 and rounded once. A quantised base is quantised again, to its own dtype and groups by
    :func:`gemma_mlp.quantize`, which rounds: dequantize the base first to merge without that.

    Raises:
      ValueError: if the tree has no weights of these names.
      ImportError: for a quantised base, if qwix is not installed.
    """

    def merged(weight):
        weight = known_weight(weight)
        if not isinstance(weight, LoRAWeight):
            return weight
        if not isinstance(weight.base, QuantizedWeight):
            return dense(weight)
        group_size = None if scales_per_channel(weight.base) else weight.base.group_size
        return quantized(dense(weight), weight.base.qvalue.dtype.name, group_size)

    return map_weights(merged, params, WEIGHTS)


def remove_lora(params: Any) -> Any:
    """`params` with the base in place of each adapted weight.

    Raises:
      ValueError: if the tree has no weights of these names.
    """
    return map_weights(base_of, params, WEIGHTS)
