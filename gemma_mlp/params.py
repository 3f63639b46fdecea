"""The parameters of the MLP and of the block around it, as plain pytrees: one table of leaves, and what follows."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Key

from gemma_mlp.config import MLPConfig
from gemma_mlp.weights import WEIGHTS, LoRAWeight, QuantizedWeight, axes_of, lora_axes, scale_axes

# Every leaf and its axes: D is embed_dim, F is hidden_dim. Weights are stored (in, out).
LEAVES = {
    "pre_norm": "D",
    "gate_proj": "DF",
    "up_proj": "DF",
    "down_proj": "FD",
    "gate_bias": "F",
    "up_bias": "F",
    "down_bias": "D",
    "post_norm": "D",
}
NORMS = tuple(name for name in LEAVES if name.endswith("_norm"))
BIASES = tuple(name for name in LEAVES if name.endswith("_bias"))
LOGICAL_NAMES = {"D": "embed", "F": "mlp"}  # of the axes, in the words of T5X and MaxText; other axes have no name
# The largest magnitudes of a fresh quantised weight: of int8 and int4 without the lowest number, of IEEE-like e4m3fn.
LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}


class LeafSpec(NamedTuple):
    """What is needed to make one leaf."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axis names
    init: Callable[..., Array]  # (key, shape, dtype) -> array


def leaf_spec(name: str, config: MLPConfig, layers: int | None = None) -> LeafSpec:
    """The spec of a leaf of LEAVES, or of a stack of `layers` of them with a leading logical axis `layers`.

    Weights are drawn with variance 1 / fan-in, which keeps unit variance through each projection and is the default
    of Flax's own Linear. Biases start at zero. A norm's scale starts where its factor is 1: at zero with
    `config.scale_plus_one`, or else at one.
    """
    letters = LEAVES[name]
    sizes = {"D": config.embed_dim, "F": config.hidden_dim}
    shape, axes = tuple(sizes[a] for a in letters), tuple(LOGICAL_NAMES[a] for a in letters)
    weight_init = jax.nn.initializers.lecun_normal(batch_axis=() if layers is None else 0)
    norm_init = jax.nn.initializers.zeros if config.scale_plus_one else jax.nn.initializers.ones
    init = norm_init if name in NORMS else weight_init if name in WEIGHTS else jax.nn.initializers.zeros
    return LeafSpec(shape, axes, init) if layers is None else LeafSpec((layers, *shape), ("layers", *axes), init)


def weight_spec(name: str, config: MLPConfig, layers: int | None = None) -> Any:
    """The spec of a weight of LEAVES, or a tree of specs if the config asks for quantised weights or adapters.

    A quantised weight is drawn from a uniform distribution of the same variance. lora_a is drawn from He's uniform
    distribution, as in Flax and qwix; lora_b is zero.
    """
    dense, letters = leaf_spec(name, config, layers), LEAVES[name]
    *lead, contracted, output = dense.shape
    weight: Any = dense

    def part(shape, axes, init):
        names = (LOGICAL_NAMES.get(letter) for letter in axes)
        return LeafSpec((*lead, *shape), (*dense.axes[: len(lead)], *names), init)

    if config.weight_dtype is not None:
        groups = 1 if config.group_size is None else contracted // config.group_size
        largest = LARGEST[config.weight_dtype]
        draw = functools.partial(_uniform, config.weight_dtype, largest)
        scale = jax.nn.initializers.constant(math.sqrt(3 / contracted) / largest)
        weight = QuantizedWeight(
            part((contracted, output), letters, draw), part((groups, output), scale_axes(letters, groups), scale)
        )
    if config.lora is not None and name in config.lora.projections:
        rank, axes = config.lora.rank, lora_axes(letters)
        draw = jax.nn.initializers.he_uniform(batch_axis=tuple(range(len(lead))))
        zeros = jax.nn.initializers.zeros
        lora_a, lora_b = part((contracted, rank), axes[0], draw), part((rank, output), axes[1], zeros)
        weight = LoRAWeight(weight, lora_a, lora_b, config.lora.factor)
    return weight


def _uniform(weight_dtype, largest, key, shape, dtype):
    values = jax.random.uniform(key, shape, minval=-largest, maxval=largest)
    return (values if weight_dtype.startswith("float") else jnp.round(values)).astype(weight_dtype)


def init_leaves(specs: Any, key: Key[Array, ""], dtype: Any) -> Any:
    """A tree like `specs` with an array for each `LeafSpec`, in `dtype` (but qvalues in their own)."""
    leaves, tree = jax.tree.flatten(specs, is_leaf=lambda node: isinstance(node, LeafSpec))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [spec.init(k, spec.shape, dtype) for k, spec in zip(keys, leaves)])


def named_leaves(params: Any) -> dict[str, Any]:
    """The leaves of an `MLPParams` or an `RMSNormParams` by name, without those that are None."""
    return {name: leaf for name, leaf in vars(params).items() if leaf is not None}


def axes_of_leaves(params: "MLPParams") -> "MLPParams":
    """A tree like `params` with the letters of each array's axes."""
    axes = {name: axes_of(leaf, LEAVES[name]) for name, leaf in named_leaves(params).items()}
    return MLPParams(**axes)  # pyright: ignore[reportArgumentType]


class _Params:
    specs: Callable[..., Any]

    @classmethod
    def init(cls, config: MLPConfig, key: Key[Array, ""]) -> Self:
        """Fresh parameters in `config.param_dtype`."""
        return init_leaves(cls.specs(config), key, config.param_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLPParams(_Params):
    """Weights of `(activation(x @ gate_proj + gate_bias) * (x @ up_proj + up_bias)) @ down_proj + down_bias`.

    Stored (in, out): [D, F], [D, F], [F, D]. Each is an array, a `QuantizedWeight` or a `LoRAWeight`. The biases are
    all there or, as in Gemma, all None.
    """

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    gate_bias: Float[Array, " F"] | None = None
    up_bias: Float[Array, " F"] | None = None
    down_bias: Float[Array, " D"] | None = None

    @classmethod
    def specs(cls, config: MLPConfig, layers: int | None = None) -> "MLPParams":
        """The same tree with a `LeafSpec` for each array; with `layers`, for a stack of that many."""
        specs: dict[str, Any] = {name: weight_spec(name, config, layers) for name in WEIGHTS}
        biases = BIASES if config.use_bias else ()
        return cls(**specs, **{name: leaf_spec(name, config, layers) for name in biases})  # pyright: ignore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMSNormParams(_Params):
    """The norm's `scale` stores w. The factor is 1 + w, or w itself with `scale_plus_one=False` in the config."""

    scale: Float[Array, " D"]

    @classmethod
    def specs(cls, config: MLPConfig, layers: int | None = None) -> "RMSNormParams":
        """The same tree with a `LeafSpec` for its one array."""
        return cls(leaf_spec("pre_norm", config, layers))  # pyright: ignore[reportArgumentType]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLPBlockParams:
    """Parameters of `x + post_norm(mlp(pre_norm(x)))`; `post_norm` is None where the model has none."""

    pre_norm: RMSNormParams
    mlp: MLPParams
    post_norm: RMSNormParams | None = None

    @classmethod
    def specs(cls, config: MLPConfig, layers: int | None = None) -> "MLPBlockParams":
        """The same tree with a `LeafSpec` for each array, for :func:`gemma_mlp.sharding.named_shardings`.

        With `layers`, the specs of a stack of that many blocks, as `jax.lax.scan` takes them.
        """
        norm = RMSNormParams.specs(config, layers)
        return cls(norm, MLPParams.specs(config, layers), norm if config.post_norm else None)

    @classmethod
    def init(cls, config: MLPConfig, key: Key[Array, ""]) -> "MLPBlockParams":
        """Fresh parameters in `config.param_dtype`."""
        post_norm = RMSNormParams.init(config, key) if config.post_norm else None
        return cls(RMSNormParams.init(config, key), MLPParams.init(config, key), post_norm)


for _kind in (MLPParams, RMSNormParams, MLPBlockParams):  # so that programs with such arguments can be serialised
    export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"gemma_mlp.{_kind.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )
