"""Converts the MLPs of an NNX model in place: low-bit weights and LoRA adapters."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_mlp import adapters, layouts, quantization
from gemma_mlp.checks import describe, require
from gemma_mlp.config import LoRA, MLPConfig
from gemma_mlp.layouts import Adapter, Adapters
from gemma_mlp.nnx_weights import own_weight, put_weights
from gemma_mlp.params import WEIGHTS, MLPBlockParams, MLPParams, named_leaves

M = TypeVar("M", bound=nnx.Module)


def quantize(module: M, dtype: Any, group_size: int | None = None) -> M:
    """Quantises the weights of each :class:`gemma_mlp.nnx.MLP` in `module`, in place, and returns `module`.

    As :func:`gemma_mlp.quantize`, with its arguments and errors. Each dense weight becomes a `QuantizedProjection` with
    the variables `qvalue` and `scale`, of type `QuantizedParam`. `config.weight_dtype` and `config.group_size` say so.
    Adapters stay.

    Raises:
      ValueError: also if there is no such MLP in `module`, or a projection is a module of another kind.
    """

    def converted(config):
        name = jnp.dtype(dtype).name
        return dataclasses.replace(config, weight_dtype=name, group_size=group_size)

    return _convert(module, lambda weights: quantization.quantize(weights, dtype, group_size), converted)


def dequantize(module: M, dtype: Any = None) -> M:
    """Makes the quantised weights of each :class:`gemma_mlp.nnx.MLP` in `module` dense again, and returns `module`.

    As :func:`gemma_mlp.dequantize`, in place.
    """

    def converted(config):
        return dataclasses.replace(config, weight_dtype=None, group_size=None)

    return _convert(module, lambda weights: quantization.dequantize(weights, dtype), converted)


def add_lora(
    module: M,
    rank: int,
    alpha: float | None = None,
    *,
    rngs: nnx.Rngs,
    use_rslora: bool = False,
    projections: Sequence[str] = WEIGHTS,
) -> M:
    """Gives each :class:`gemma_mlp.nnx.MLP` in `module` LoRA adapters, in place, and returns `module`.

    The weights may be dense or quantised. Train the adapters alone with `nnx.DiffState(0, nnx.LoRAParam)` and
    `nnx.Optimizer(model, optimizer, wrt=nnx.LoRAParam)`: the weights' gradients are then neither computed nor stored.

    Args:
      module: an MLP, or a model with MLPs.
      rank, alpha, use_rslora, projections: as in `gemma_mlp.LoRA`. The factor is kept as metadata of the variables.
      rngs: `params` draws lora_a; lora_b is zero, so that nothing changes before training.

    Raises:
      ValueError: as `gemma_mlp.LoRA` and :func:`gemma_mlp.add_lora` do, or if there is no such MLP in `module`.
    """
    lora = LoRA(rank, alpha, use_rslora, tuple(projections))
    return _convert(
        module,
        lambda weights: adapters.add_lora(weights, lora, rngs.params()),
        lambda config: dataclasses.replace(config, lora=lora),
    )


def merge_lora(module: M) -> M:
    """Adds the adapters of each :class:`gemma_mlp.nnx.MLP` in `module` to its weights, in place, and returns `module`.

    As :func:`gemma_mlp.merge_lora`, which quantises a quantised base again.
    """
    return _convert(module, adapters.merge_lora, lambda config: dataclasses.replace(config, lora=None))


def remove_lora(module: M) -> M:
    """Takes the adapters off each :class:`gemma_mlp.nnx.MLP` in `module`, in place, and returns `module`."""
    return _convert(module, adapters.remove_lora, lambda config: dataclasses.replace(config, lora=None))


def insert_adapters(module: M, adapters: Adapters) -> M:
    """Puts adapters, such as :func:`gemma_mlp.checkpoint.read_adapters` returns, on a model, in place, and returns it.

    Layer i is the i-th :class:`gemma_mlp.nnx.MLP` of `module`, in the order of their paths (`layers.2` before
    `layers.10`). An MLP whose weights are a stack [L, in, out] is L layers, whose adapters must then be alike. The
    factors are kept as metadata; `config.lora` stays None, since no config describes adapters of several ranks.

    Raises:
      ValueError: if there is no such layer or projection, it has an adapter already, or sizes do not fit.
    """
    mlps = _mlps(module)
    layers = _layers(mlps)
    put = layouts.insert_adapters([MLPBlockParams(None, MLPParams(**layer)) for layer in layers], adapters)  # pyright: ignore
    _put_layers(mlps, [named_leaves(layer.mlp) for layer in put])
    return module


def extract_adapters(module: nnx.Module) -> dict[int, dict[str, Adapter]]:
    """The adapters on a model, as :func:`gemma_mlp.checkpoint.write_adapters` takes them; layers are counted as in
    :func:`insert_adapters`.

    Raises:
      ValueError: if there are none.
    """
    layers = _layers(_mlps(module))
    return layouts.extract_adapters([MLPBlockParams(None, MLPParams(**layer)) for layer in layers])  # pyright: ignore


def _layers(mlps: list[Any]) -> list[dict[str, Any]]:
    """The weights of each layer by name; a stack of L layers is L."""
    layers = []
    for mlp in mlps:
        weights = {name: own_weight(mlp, name) for name in WEIGHTS}
        if weights["gate_proj"].ndim == 2:
            layers.append(weights)
        else:
            count = weights["gate_proj"].shape[0]
            layers += [jax.tree.map(lambda leaf, i=i: leaf[i], weights) for i in range(count)]
    return layers


def _put_layers(mlps: list[Any], layers: list[dict[str, Any]]) -> None:
    for mlp in mlps:
        stacked = own_weight(mlp, "gate_proj").ndim == 3
        count = own_weight(mlp, "gate_proj").shape[0] if stacked else 1
        own, layers = layers[:count], layers[count:]
        alike = all(jax.tree.map(jnp.shape, layer) == jax.tree.map(jnp.shape, own[0]) for layer in own)
        require(
            alike,
            "The layers of a stack must have adapters of the same projections, ranks and factors.",
            f"others among {count} stacked layers",
            "pad the ranks with zeros, or unstack the layers.",
        )
        put_weights(mlp, jax.tree.map(lambda *leaves: jnp.stack(leaves), *own) if stacked else own[0])


def _convert(module: M, change: Callable[[dict[str, Any]], Any], configured: Callable[[MLPConfig], MLPConfig]) -> M:
    mlps = _mlps(module)
    changed = [change({name: own_weight(mlp, name) for name in WEIGHTS}) for mlp in mlps]
    for mlp, weights in zip(mlps, changed):  # only once all of them could be changed
        put_weights(mlp, weights)
    for _, child in nnx.iter_modules(module):
        config, inner = getattr(child, "config", None), getattr(child, "mlp", child)
        if isinstance(config, MLPConfig) and any(inner is mlp for mlp in mlps):  # an MLP, or the block around it
            child.config = configured(config)  # pyright: ignore[reportAttributeAccessIssue]
    return module


def _mlps(module: nnx.Module) -> list[Any]:
    """The MLPs of ours in a model, in the order of their paths. Raises ValueError if there is none."""

    def is_mlp(child):
        return isinstance(getattr(child, "config", None), MLPConfig) and all(hasattr(child, name) for name in WEIGHTS)

    found = [(path, child) for path, child in nnx.iter_modules(module) if is_mlp(child)]
    require(
        bool(found),
        "The module must be a gemma_mlp.nnx.MLP, or hold one.",
        f"a {describe(module)} without one",
        "for another library's MLP use its own ways, such as nnx.LoRA or qwix.",
    )
    return [child for _, child in sorted(found, key=lambda entry: [_in_order(key) for key in entry[0]])]


def _in_order(key: Any) -> tuple[str, int]:
    """Sorts the keys of a path: layers_2 before layers_10, whether numbers are keys of a list or part of a name."""
    name, number = re.fullmatch(r"(.*?)(\d*)", str(key)).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return name, int(number or 0)
