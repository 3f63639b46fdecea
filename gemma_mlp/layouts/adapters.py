"""Adapters apart from the weights that they adapt: put onto layers, taken off, and DeepMind's trees of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from gemma_mlp.checks import describe, require
from gemma_mlp.params import WEIGHTS, MLPBlockParams, named_leaves
from gemma_mlp.weights import LoRAWeight, known_weight, require_sound


class Adapter(NamedTuple):
    """factor * lora_a @ lora_b, which is added to a weight [in, out]."""

    lora_a: Float[Array, "in rank"]
    lora_b: Float[Array, "rank out"]
    factor: float = 1.0


Adapters = Mapping[int, Mapping[str, Adapter]]  # by the number of the layer and the name of the projection


def insert_adapters(layers: Sequence[MLPBlockParams], adapters: Adapters) -> list[MLPBlockParams]:
    """`layers` with a `gemma_mlp.LoRAWeight` in place of each weight that has an adapter.

    Args:
      layers: of the whole model, so that the position of a layer is its number. Weights may be dense or quantised.
      adapters: by the number of the layer and the name of the projection.

    Raises:
      ValueError: if there is no such layer or projection, if it has an adapter already, or if sizes do not fit.
    """
    result = list(layers)
    for number, of_layer in adapters.items():
        require(
            number in range(len(result)),
            f"Adapters must be for some of the layers 0 to {len(result) - 1}.",
            f"an adapter for layer {number}",
            "use the adapters of a model of this size.",
        )
        weights = named_leaves(result[number].mlp)
        for name, adapter in of_layer.items():
            place = f"{name} of layer {number}"
            require(name in WEIGHTS, f"Adapters must be for some of {', '.join(WEIGHTS)}.", place, "check its name.")
            weight = LoRAWeight(known_weight(weights[name]), *adapter)
            require_sound(place, weight)
            weights[name] = weight
        mlp = dataclasses.replace(result[number].mlp, **weights)
        result[number] = dataclasses.replace(result[number], mlp=mlp)
    return result


def extract_adapters(layers: Sequence[MLPBlockParams]) -> dict[int, dict[str, Adapter]]:
    """The adapters on `layers`: the inverse of :func:`insert_adapters`. `gemma_mlp.remove_lora` gives the rest.

    Raises:
      ValueError: if no weight has an adapter.
    """
    adapters = {}
    for number, layer in enumerate(layers):
        weights = named_leaves(layer.mlp).items()
        found = {name: Adapter(w.lora_a, w.lora_b, w.factor) for name, w in weights if isinstance(w, LoRAWeight)}
        adapters |= {number: found} if found else {}
    require(bool(adapters), "The layers must have adapters.", "no adapter", "gemma_mlp.add_lora makes them.")
    return adapters


def require_adapters(adapters: Any) -> None:
    """Raises ValueError unless `adapters` are by layer and projection, and each is [in, rank] and [rank, out]."""
    require(bool(adapters), "There must be adapters.", repr(adapters), "gemma_mlp.add_lora makes them.")
    for number, of_layer in adapters.items():
        for name, (a, b, _) in of_layer.items():
            require(
                name in WEIGHTS and a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0],
                f"An adapter must be for one of {', '.join(WEIGHTS)}: lora_a [in, rank] and lora_b [rank, out].",
                f"lora_a {describe(a)}, lora_b {describe(b)} for {name} of layer {number}",
                "PEFT stores the transposed matrices; unstack layers first.",
            )
