"""What a weight may be besides a dense array: low-bit numbers with scales, and a weight with a LoRA adapter.

A weight W [in, out] is one of

- an array;
- a :class:`QuantizedWeight`: small integers or float8 with scales. It is frozen: it has no gradient;
- a :class:`LoRAWeight`: a weight of one of the first two kinds, its base, plus a product of two narrow matrices.

Both are pytrees, and each works wherever the feed-forward takes an array as a weight. op/matmuls.py multiplies by them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array

from gemma_mlp.checks import describe, require, require_choice
from gemma_mlp.dtypes import DTYPES, accumulation_dtype

WEIGHTS = ("gate_proj", "up_proj", "down_proj")
WeightDtype = Literal["int8", "int4", "float8_e4m3fn"]
WEIGHT_DTYPES = get_args(WeightDtype)  # of quantised weights
LORA = ("lora_a", "lora_b")  # the two matrices of an adapter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """W[i, o] = qvalue[i, o] * scale[i // group_size, o], where group_size = in / groups.

    With one group there is one scale for each output channel. The names are those of qwix's `QArray`, and so are the
    paths of both in a checkpoint. Stacks of layers have one more axis in front.

    Attributes:
      qvalue: [in, out], int8, int4 or float8_e4m3fn.
      scale: [groups, out], a floating-point dtype, which counts as the weight's dtype.
    """

    qvalue: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    @property
    def group_size(self) -> int:
        """How many numbers along the contracted axis `in` share a scale."""
        return self.qvalue.shape[-2] // self.scale.shape[-2]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "lora_a", "lora_b"], meta_fields=["factor"])
@dataclasses.dataclass(frozen=True)
class LoRAWeight:
    """W = base + factor * lora_a @ lora_b: low-rank adaptation (LoRA, arXiv:2106.09685).

    Attributes:
      base: an array or a QuantizedWeight, [in, out].
      lora_a: [in, rank].
      lora_b: [rank, out].
      factor: alpha / rank in the paper; alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732).
    """

    base: Any
    lora_a: Any
    lora_b: Any
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def dtype(self) -> Any:
        return self.base.dtype


def _serialize_factor(factor: Any) -> bytes:
    return repr(factor[0]).encode()


def _deserialize_factor(data: bytes) -> tuple[float]:
    return (float(data),)


export.register_pytree_node_serialization(
    QuantizedWeight,
    serialized_name="gemma_mlp.QuantizedWeight",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)
export.register_pytree_node_serialization(
    LoRAWeight,
    serialized_name="gemma_mlp.LoRAWeight",
    serialize_auxdata=_serialize_factor,
    deserialize_auxdata=_deserialize_factor,
)


def known_weight(weight: Any) -> Any:
    """`weight`, with a `QArray` of qwix (also as the base of an adapter) as a :class:`QuantizedWeight`.

    Raises:
      ValueError: for an asymmetric `QArray`, that is one with a zero point.
    """
    if isinstance(weight, LoRAWeight):
        return dataclasses.replace(weight, base=known_weight(weight.base))
    if isinstance(weight, QuantizedWeight) or not (hasattr(weight, "qvalue") and hasattr(weight, "scale")):
        return weight
    require(
        getattr(weight, "zero_point", None) is None,
        "Quantised weights must be symmetric: value = qvalue * scale.",
        "a QArray with a zero_point",
        "quantise with qwix's calibration method 'absmax', or call qwix.dequantize.",
    )
    return QuantizedWeight(weight.qvalue, weight.scale)


def scales_per_channel(weight: QuantizedWeight) -> bool:
    """Whether there is one scale for each output channel, instead of one for each group."""
    return weight.scale.shape[-2] == 1


def base_of(weight: Any) -> Any:
    """`weight` without its adapter, if it has one."""
    return weight.base if isinstance(weight, LoRAWeight) else weight


def has_groups(weight: Any) -> bool:
    """Whether it is quantised with several scales for each output channel."""
    return isinstance(weight, QuantizedWeight) and not scales_per_channel(weight)


def scale_axes(axes: str, groups: int) -> str:
    """The letters of a scale's axes; those of the dense weight are `axes`, such as DF.

    Groups along F are split and sliced like F. Other groups (g) are not: along D they are few.
    """
    return ("F" if groups > 1 and axes[0] == "F" else "g") + axes[1]


def lora_axes(axes: str) -> tuple[str, str]:
    """The letters of the axes of lora_a and lora_b; those of the dense weight are `axes`. r is the rank."""
    return axes[0] + "r", "r" + axes[1]


def axes_of(weight: Any, axes: str) -> Any:
    """A tree like `weight` with the letters of each array's axes; those of the dense weight are `axes`."""
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight(axes, scale_axes(axes, weight.scale.shape[-2]))
    if isinstance(weight, LoRAWeight):
        return LoRAWeight(axes_of(weight.base, axes), *lora_axes(axes), weight.factor)
    return axes


def require_sound(name: str, weight: Any) -> None:
    """Raises ValueError unless dtypes and shapes inside of a quantised or adapted weight fit together."""
    if isinstance(weight, LoRAWeight):
        require(
            not isinstance(weight.base, LoRAWeight),
            f"{name} can have one adapter.",
            "an adapter on an adapted weight",
            "merge the first one into its base with merge_lora.",
        )
        require_sound(name, weight.base)
        a, b, (contracted, output) = weight.lora_a, weight.lora_b, weight.shape[-2:]
        fits = all(m.dtype.name in DTYPES for m in (a, b)) and a.shape[-1:] == b.shape[-2:-1]
        require(
            fits and a.shape[-2:-1] == (contracted,) and b.shape[-1:] == (output,),
            f"{name}'s adapter must be lora_a [{contracted}, rank] and lora_b [rank, {output}], {', '.join(DTYPES)}.",
            f"lora_a {describe(a)}, lora_b {describe(b)}",
            "use the adapter of a model of this size; PEFT stores the transposed matrices.",
        )
    elif isinstance(weight, QuantizedWeight):
        qvalue, scale = weight.qvalue, weight.scale
        require_choice(f"{name}'s qvalue dtype", qvalue.dtype.name, WEIGHT_DTYPES)
        sizes = (*qvalue.shape[:-2], qvalue.shape[-1])
        require(
            scale.ndim == qvalue.ndim
            and scale.dtype.name in DTYPES
            and (*scale.shape[:-2], scale.shape[-1]) == sizes
            and scale.shape[-2] > 0
            and qvalue.shape[-2] % scale.shape[-2] == 0,
            f"{name}'s scale must be [groups, out] in one of {', '.join(DTYPES)}, where groups divides in.",
            f"qvalue {describe(qvalue)}, scale {describe(scale)}",
            "give one row of scales for each group along the contracted axis, or one row in all.",
        )


def dense(weight: Any, dtype: Any = None) -> Array:
    """`weight` as one array in `dtype`, or else in its own: computed in float32 (float64 for that), rounded once."""
    dtype = jnp.dtype(dtype or weight.dtype)
    wide = accumulation_dtype(dtype)
    if isinstance(weight, LoRAWeight):
        exact = jax.lax.Precision.HIGHEST
        delta = jnp.matmul(weight.lora_a.astype(wide), weight.lora_b.astype(wide), precision=exact)
        return (dense(weight.base, wide) + weight.factor * delta).astype(dtype)
    if isinstance(weight, QuantizedWeight):
        *lead, contracted, output = weight.shape
        groups = weight.qvalue.astype(wide).reshape(*lead, -1, weight.group_size, output)
        scaled = groups * weight.scale[..., :, None, :].astype(wide)
        return scaled.reshape(*lead, contracted, output).astype(dtype)
    return weight.astype(dtype)


def map_weights(function: Callable[[Any], Any], tree: Any, names: tuple[str, ...]) -> Any:
    """`tree` with `function` of each weight: each subtree under one of `names` (MLPParams, dicts, Linen's boxes)."""
    found = 0

    def at(path, leaf):
        nonlocal found
        keys = {getattr(key, "name", getattr(key, "key", None)) for key in path}
        if not keys & set(names):
            return leaf
        found += 1
        return function(leaf)

    def is_whole(node):
        return isinstance(node, QuantizedWeight | LoRAWeight) or (hasattr(node, "qvalue") and hasattr(node, "scale"))

    mapped = jax.tree_util.tree_map_with_path(at, tree, is_leaf=is_whole)
    require(
        found > 0,
        f"The tree must have leaves called {', '.join(names)}.",
        describe(tree),
        "pass MLPParams, MLPBlockParams or the params of a Linen module; NNX modules have gemma_mlp.nnx.quantize.",
    )
    return mapped
