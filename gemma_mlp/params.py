"""The parameters of the MLP and of the block around it, as plain pytrees: one table of leaves, and what follows."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
from jax import export
from jaxtyping import Array, Float, Key

from gemma_mlp.config import MLPConfig
from gemma_mlp.weights import axes_of

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
WEIGHTS = tuple(name for name, axes in LEAVES.items() if len(axes) == 2)
NORMS = tuple(name for name in LEAVES if name.endswith("_norm"))
BIASES = tuple(name for name in LEAVES if name.endswith("_bias"))
LOGICAL_NAMES = {"D": "embed", "F": "mlp"}  # of the axes, in the words of T5X and MaxText


class LeafSpec(NamedTuple):
    """What is needed to make one leaf."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical axis names
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
        leaves = named_leaves(cls.specs(config))
        keys = jax.random.split(key, len(leaves))
        return cls(**{n: spec.init(k, spec.shape, config.param_dtype) for k, (n, spec) in zip(keys, leaves.items())})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLPParams(_Params):
    """Weights of `(activation(x @ gate_proj + gate_bias) * (x @ up_proj + up_bias)) @ down_proj + down_bias`.

    Stored (in, out). The biases are all there or, as in Gemma, all None.
    """

    gate_proj: Float[Array, "D F"]
    up_proj: Float[Array, "D F"]
    down_proj: Float[Array, "F D"]
    gate_bias: Float[Array, " F"] | None = None
    up_bias: Float[Array, " F"] | None = None
    down_bias: Float[Array, " D"] | None = None

    @classmethod
    def specs(cls, config: MLPConfig, layers: int | None = None) -> "MLPParams":
        """The same tree with a `LeafSpec` for each array; with `layers`, for a stack of that many."""
        names = (*WEIGHTS, *BIASES) if config.use_bias else WEIGHTS
        return cls(**{name: leaf_spec(name, config, layers) for name in names})  # pyright: ignore[reportArgumentType]


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
