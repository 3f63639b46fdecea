"""The weights of an NNX MLP as variables: dense, quantised and adapted.

| weight | variables of the MLP |
|---|---|
| dense | `gate_proj`, an `nnx.Param` |
| quantised | `gate_proj.qvalue` and `gate_proj.scale`, each a :class:`QuantizedParam` |
| adapted | those of its base, and `gate_proj_lora_a`, `gate_proj_lora_b`, each an `nnx.LoRAParam` |
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from gemma_mlp.checks import describe, require
from gemma_mlp.config import MLPConfig
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
from gemma_mlp.weights import LORA, LoRAWeight, QuantizedWeight, base_of, known_weight, lora_axes, scale_axes


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
    if lora_a is None and lora_b is None:
        return weight
    if lora_a is None or lora_b is None or "factor" not in lora_b.get_metadata():
        raise ValueError(
            f"An adapter must be {name}_lora_a and {name}_lora_b, with its factor as metadata. "
            f"Got: lora_a {describe(lora_a)}, lora_b {describe(lora_b)}. "
            "Fix: make adapters with gemma_mlp.nnx.add_lora or insert_adapters."
        )
    return LoRAWeight(weight, lora_a.get_value(), lora_b.get_value(), lora_b.get_metadata()["factor"])


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


def get_params(block: Any) -> MLPBlockParams:
    """The parameters of a :class:`gemma_mlp.nnx.MLPBlock`, as :func:`gemma_mlp.mlp_block` and checkpoints take them."""
    weights = {name: own_weight(block.mlp, name) for name in WEIGHTS}
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


def put_weights(mlp: nnx.Module, weights: dict[str, Any]) -> None:
    """Replaces the variables of an MLP's weights by those of `weights`, with the names of the axes that they had."""
    for name, weight in weights.items():
        base = base_of(weight)
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


def own_weight(mlp: nnx.Module, name: str) -> Any:
    """The weight `name` of an MLP. Raises ValueError if a module of somebody else's is in its place."""
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
