"""Adapters apart from the weights that they adapt: put onto layers, taken off, and DeepMind's trees of them."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_mlp.checks import describe, require
from gemma_mlp.layouts.trees import flatten
from gemma_mlp.params import LEAVES, WEIGHTS, MLPBlockParams, named_leaves
from gemma_mlp.weights import LoRAWeight, known_weight, require_sound


class Adapter(NamedTuple):
    """factor * lora_a @ lora_b, which is added to a weight [in, out]."""

    lora_a: Float[Array, "in rank"]
    lora_b: Float[Array, "rank out"]
    factor: float = 1.0


Adapters = Mapping[int, Mapping[str, Adapter]]  # by the number of the layer and the name of the projection
DEEPMIND = re.compile(r"(?:.*/)?layer_(\d+)/mlp/_LoRAEinsum_(gating_einsum|linear)/lora/([ab])")


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


def adapters_from_deepmind(tree: Any) -> dict[int, dict[str, Adapter]]:
    """The adapters in a tree of DeepMind's `gm.nn.LoRA`, without a loss. Adapters of attention are passed over.

    `layer_0/mlp/_LoRAEinsum_gating_einsum/lora` holds a [D, rank], which gate and up share, and b [rank, 2, F].
    `_LoRAEinsum_linear/lora` holds a [F, rank] and b [rank, D]. Their factor is 1.

    Raises:
      ValueError: if there are none, or their shapes do not fit together.
    """
    pairs: dict[tuple[int, str], dict[str, Any]] = {}
    for name, array in flatten(tree).items():
        found = DEEPMIND.fullmatch(name)
        if found:
            pair = pairs.setdefault((int(found[1]), found[2]), {})
            rule, fix = "Every adapter must be in the tree once.", "pass the parameters alone, without other trees."
            require(found[3] not in pair, rule, f"another {name}", fix)
            pair[found[3]] = array
    adapters: dict[int, dict[str, Adapter]] = {}
    for (number, module), pair in sorted(pairs.items()):
        shapes = {matrix: tuple(array.shape) for matrix, array in pair.items()}
        a, b = shapes.get("a", ()), shapes.get("b", ())
        middle = (2,) if module == "gating_einsum" else ()
        require(
            len(a) == 2 and len(b) == 2 + len(middle) and a[1:] == b[:1] and b[1:-1] == middle,
            f"The adapter of {module} must have a [in, rank] and b [{', '.join(map(str, ('rank', *middle, 'out')))}].",
            f"{shapes} in layer {number}",
            "give the tree as gm.nn.LoRA makes it.",
        )
        of_layer = adapters.setdefault(number, {})
        if middle:
            of_layer |= {name: Adapter(pair["a"], pair["b"][:, i]) for i, name in enumerate(WEIGHTS[:2])}
        else:
            of_layer[WEIGHTS[2]] = Adapter(pair["a"], pair["b"])
    fix = 'pass the parameters of gm.nn.LoRA, or the "lora" part that peft.split_params gives.'
    require(bool(adapters), "The tree must hold adapters of an MLP.", "none", fix)
    return adapters


def adapters_to_deepmind(adapters: Adapters, *, widen: bool = False) -> dict[str, Any]:
    """The tree of DeepMind's `gm.nn.LoRA`: the inverse of :func:`adapters_from_deepmind`.

    Their gate and up share lora_a, one rank serves the whole model, and there is no factor. A factor that is a power of
    two goes into lora_b without rounding. Any other is refused: multiply lora_b by it, in the dtype of your choice.

    Args:
      adapters: by the number of the layer and the name of the projection.
      widen: False: refuse adapters that do not fit. True: write them with a larger rank, filled up with zeros. They
        compute the same. Where gate and up do not share lora_a, the rank is the sum of theirs.

    Raises:
      ValueError: if DeepMind's tree cannot hold the adapters.
    """
    require_adapters(adapters)
    layers = {number: _of_deepmind(number, of_layer, widen) for number, of_layer in sorted(adapters.items())}
    ranks = {b.shape[0] for pairs in layers.values() for _, b in pairs.values()}
    require(widen or len(ranks) == 1, "All adapters must have one rank.", f"ranks {sorted(ranks)}", "pass widen=True.")
    rank = max(ranks)

    def filled(a, b):
        more = rank - b.shape[0]
        return {"a": jnp.pad(a, ((0, 0), (0, more))), "b": jnp.pad(b, ((0, more), *((0, 0),) * (b.ndim - 1)))}

    return {
        f"layer_{number}": {
            "mlp": {f"_LoRAEinsum_{module}": {"lora": filled(*pair)} for module, pair in pairs.items()},
        }
        for number, pairs in layers.items()
    }


def _of_deepmind(number: int, of_layer: Mapping[str, Adapter], widen: bool) -> dict[str, tuple[Any, Any]]:
    """a and b of `gating_einsum` and of `linear` in one layer."""
    missing = [name for name in WEIGHTS if name not in of_layer]
    received, fix = f"none for {', '.join(missing)} in layer {number}", "pass widen=True, which writes zeros there."
    require(widen or not missing, f"There must be adapters for {', '.join(WEIGHTS)}.", received, fix)
    dtypes = {matrix.dtype for a, b, _ in of_layer.values() for matrix in (a, b)}
    received, fix = ", ".join(sorted(map(str, dtypes))), "cast them to one."
    require(len(dtypes) == 1, f"The adapters of layer {number} must have one dtype.", received, fix)
    sizes: dict[str, int] = {}
    for name, (a, b, _) in of_layer.items():
        sizes |= dict(zip(LEAVES[name], (a.shape[0], b.shape[1])))
    pairs = {}
    for name in WEIGHTS:
        contracted, output = (sizes[axis] for axis in LEAVES[name])
        nothing = Adapter(jnp.zeros((contracted, 0), *dtypes), jnp.zeros((0, output), *dtypes))
        a, b, factor = of_layer.get(name, nothing)
        mantissa, exponent = math.frexp(factor)
        power = jnp.asarray(factor if abs(exponent) < 64 else 1, b.dtype)
        scaled = b * power
        require(
            mantissa == 0.5 and float(power) == factor and bool(jnp.array_equal(scaled / power, b, equal_nan=True)),
            "DeepMind's adapters have no factor. So it must be a power of two, by which lora_b is multiplied exactly.",
            f"factor {factor} for {name} of layer {number}",
            "multiply lora_b by it yourself, which rounds, and give the factor 1.",
        )
        pairs[name] = jnp.asarray(a), scaled
    (gate_a, gate_b), (up_a, up_b), down = (pairs[name] for name in WEIGHTS)
    if gate_a.shape == up_a.shape and bool((gate_a == up_a).all()):
        return {"gating_einsum": (gate_a, jnp.stack([gate_b, up_b], axis=1)), "linear": down}
    require(
        widen,
        "DeepMind's gate and up share lora_a.",
        f"two of them in layer {number}",
        "pass widen=True, which writes them side by side, with the sum of their ranks.",
    )
    gate_b = jnp.pad(gate_b, ((0, len(up_b)), (0, 0)))
    up_b = jnp.pad(up_b, ((len(gate_b) - len(up_b), 0), (0, 0)))
    return {
        "gating_einsum": (jnp.concatenate([gate_a, up_a], axis=1), jnp.stack([gate_b, up_b], axis=1)),
        "linear": down,
    }
