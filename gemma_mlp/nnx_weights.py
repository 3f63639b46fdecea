"""The weights of an NNX MLP as variables: dense, quantised and adapted; and modules converted in place.

| weight | variables of the MLP |
|---|---|
| dense | `gate_proj`, an `nnx.Param` |
| quantised | `gate_proj.qvalue` and `gate_proj.scale`, each a :class:`QuantizedParam` |
| adapted | those of its base, and `gate_proj_lora_a`, `gate_proj_lora_b`, each an `nnx.LoRAParam` |
"""

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
from gemma_mlp.params import (
    BIASES,
    LEAVES,
    LOGICAL_NAMES,
    WEIGHTS,
    LeafSpec,
    MLPBlockParams,
    MLPParams,
    RMSNormParams,
    named_leaves,
)
from gemma_mlp.sharding import leaf_rules
from gemma_mlp.weights import LORA, LoRAWeight, QuantizedWeight, known_weight, lora_axes, scale_axes

M = TypeVar("M", bound=nnx.Module)


class QuantizedParam(nnx.Variable):
    """An array of a quantised weight. It is frozen, and so no `nnx.Param`: `nnx.grad` and optimizers pass it by."""


class QuantizedProjection(nnx.Module):
    """A quantised weight of an :class:`gemma_mlp.nnx.MLP`, as `gemma_mlp.QuantizedWeight`."""

    def __init__(self, qvalue: QuantizedParam, scale: QuantizedParam):
        self.qvalue = qvalue
        self.scale = scale


def weight_of(mlp: nnx.Module, name: str) -> Any:
    """The weight `name` of an MLP as the feed-forward takes it; None if a module of somebody else's is in its place."""
    projection = getattr(mlp, name)
    if isinstance(projection, QuantizedProjection):
        weight = QuantizedWeight(projection.qvalue.get_value(), projection.scale.get_value())
    elif isinstance(projection, nnx.Variable):
        weight = projection.get_value()
    else:
        return None
    lora_a, lora_b = (getattr(mlp, f"{name}_{part}", None) for part in LORA)
    if lora_a is None or lora_b is None:
        return weight
    return LoRAWeight(weight, lora_a.get_value(), lora_b.get_value(), lora_b.get_metadata().get("factor", 1.0))


def add_variables(module: nnx.Module, name: str, spec: Any, config: MLPConfig, rngs: nnx.Rngs) -> None:
    """Makes the variables of one leaf of `MLPParams.specs(config)` or `RMSNormParams.specs(config)`."""

    def variable(kind, spec: LeafSpec, **metadata):
        names = names_of(spec.axes, config)
        return kind(spec.init(rngs.params(), spec.shape, config.param_dtype), **names, **metadata)

    if isinstance(spec, LoRAWeight):
        add_variables(module, name, spec.base, config, rngs)
        lora_a, lora_b = (variable(nnx.LoRAParam, getattr(spec, part), factor=spec.factor) for part in LORA)
        setattr(module, f"{name}_lora_a", lora_a)
        setattr(module, f"{name}_lora_b", lora_b)
    elif isinstance(spec, QuantizedWeight):
        parts = (variable(QuantizedParam, part) for part in (spec.qvalue, spec.scale))
        setattr(module, name, QuantizedProjection(*parts))
    else:
        setattr(module, name, variable(nnx.Param, spec))


def names_of(axes: Sequence[str | None], config: MLPConfig) -> dict[str, Any]:
    """The metadata of a variable with these logical axes."""
    # Nothing is sharded here: a model is made with or without a mesh. The rules tell Flax what the names stand for.
    names: dict[str, Any] = {"out_sharding": tuple(axes), "eager_sharding": False}
    if config.axis_rules is not None:
        names["sharding_rules"] = leaf_rules(tuple(axes), config.axis_rules)
    return names


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


def get_params(block: Any) -> MLPBlockParams:
    """The parameters of a :class:`gemma_mlp.nnx.MLPBlock`, as :func:`gemma_mlp.mlp_block` and checkpoints take them."""
    weights = {name: _own_weight(block.mlp, name) for name in WEIGHTS}
    biases = {name: getattr(block.mlp, name).get_value() for name in BIASES if hasattr(block.mlp, name)}
    pre_norm, post_norm = (norm and RMSNormParams(norm.scale.get_value()) for norm in (block.pre_norm, block.post_norm))
    return MLPBlockParams(pre_norm, MLPParams(**weights, **biases), post_norm)


def set_params(block: Any, params: MLPBlockParams) -> None:
    """Gives a :class:`gemma_mlp.nnx.MLPBlock` these parameters, such as those that a checkpoint holds.

    Its weights become quantised or adapted where those of `params` are.

    Raises:
      ValueError: if `params` are not of the block's sizes, or lack a norm or biases that it has.
    """

    def shapes(params):
        leaves = {"pre_norm": params.pre_norm.scale, **named_leaves(params.mlp)}
        leaves |= {} if params.post_norm is None else {"post_norm": params.post_norm.scale}
        return {name: tuple(leaf.shape) for name, leaf in leaves.items()}

    expected, received = shapes(get_params(block)), shapes(params)
    fix = "make the block with the checkpoint's config: gemma_mlp.checkpoint.read_config."
    require(expected == received, f"The parameters must be {expected}.", str(received), fix)
    block.pre_norm.scale.set_value(params.pre_norm.scale)
    if params.post_norm is not None:
        block.post_norm.scale.set_value(params.post_norm.scale)
    leaves = named_leaves(params.mlp)
    for name in BIASES:
        if name in leaves:
            getattr(block.mlp, name).set_value(leaves[name])
    put_weights(block.mlp, {name: known_weight(leaves[name]) for name in WEIGHTS})


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
        weights = {name: _own_weight(mlp, name) for name in WEIGHTS}
        if weights["gate_proj"].ndim == 2:
            layers.append(weights)
        else:
            count = weights["gate_proj"].shape[0]
            layers += [jax.tree.map(lambda leaf, i=i: leaf[i], weights) for i in range(count)]
    return layers


def _put_layers(mlps: list[Any], layers: list[dict[str, Any]]) -> None:
    for mlp in mlps:
        stacked = _own_weight(mlp, "gate_proj").ndim == 3
        count = _own_weight(mlp, "gate_proj").shape[0] if stacked else 1
        own, layers = layers[:count], layers[count:]
        alike = all(jax.tree.map(jnp.shape, layer) == jax.tree.map(jnp.shape, own[0]) for layer in own)
        require(
            alike,
            "The layers of a stack must have adapters of the same projections, ranks and factors.",
            f"others among {count} stacked layers",
            "pad the ranks with zeros, or unstack the layers.",
        )
        put_weights(mlp, jax.tree.map(lambda *leaves: jnp.stack(leaves), *own) if stacked else own[0])


def put_weights(mlp: nnx.Module, weights: dict[str, Any]) -> None:
    """Replaces the variables of an MLP's weights by those of `weights`, with the names of the axes that they had."""
    for name, weight in weights.items():
        base = weight.base if isinstance(weight, LoRAWeight) else weight
        projection: Any = getattr(mlp, name)
        old = projection.qvalue if isinstance(projection, QuantizedProjection) else projection
        if isinstance(base, QuantizedWeight):
            qvalue = _variable_like(QuantizedParam, base.qvalue, old, LEAVES[name], mlp)
            groups = scale_axes(LEAVES[name], base.scale.shape[-2])
            scale = _variable_like(QuantizedParam, base.scale, old, groups, mlp)
            setattr(mlp, name, QuantizedProjection(qvalue, scale))
        elif isinstance(old, nnx.Param):
            old.set_value(base)
        else:
            setattr(mlp, name, _variable_like(nnx.Param, base, old, LEAVES[name], mlp))
        for part, axes in zip(LORA, lora_axes(LEAVES[name])):
            attribute = f"{name}_{part}"
            if isinstance(weight, LoRAWeight):
                value = _variable_like(nnx.LoRAParam, getattr(weight, part), old, axes, mlp, factor=weight.factor)
                setattr(mlp, attribute, value)
            elif hasattr(mlp, attribute):
                delattr(mlp, attribute)


def _convert(module: M, change: Callable[[dict[str, Any]], Any], configured: Callable[[MLPConfig], MLPConfig]) -> M:
    mlps = _mlps(module)
    changed = [change({name: _own_weight(mlp, name) for name in WEIGHTS}) for mlp in mlps]
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


def _own_weight(mlp: nnx.Module, name: str) -> Any:
    weight = known_weight(weight_of(mlp, name))
    require(
        weight is not None,
        f"{name} must be a variable of the MLP.",
        f"a {describe(getattr(mlp, name))}",
        "convert the MLP before you replace its projections by modules.",
    )
    return weight


def _variable_like(kind: Any, value: jax.Array, old: nnx.Variable, axes: str, mlp: Any, **metadata: Any) -> Any:
    """A variable on the axes of this weight, with those in front (of a stack of layers) that `old` has."""
    names = old.get_metadata().get("out_sharding") or ()
    lead = names[: len(names) - 2]
    return kind(value, **names_of((*lead, *(LOGICAL_NAMES.get(axis) for axis in axes)), mlp.config), **metadata)
