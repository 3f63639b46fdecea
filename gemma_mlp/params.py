"""The parameters of the MLP and of the block around it, as plain pytrees: shapes, initialisers, logical axes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Key

from gemma_mlp.config import MLPConfig


class ParamSpec(NamedTuple):
    """What a module needs in order to make one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical axis names, in the words of T5X and MaxText
    init: Callable[..., Array]  # (key, shape, dtype) -> array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLPParams:
    """Weights of `(activation(x @ gate_proj + gate_bias) * (x @ up_proj + up_bias)) @ down_proj + down_bias`.

    Stored (in, out). The biases are all there or, as in Gemma, all None.
    """

    gate_proj: Float[Array, "D F"]
    up_proj: Float[Array, "D F"]
    down_proj: Float[Array, "F D"]
    gate_bias: Float[Array, " F"] | None = None
    up_bias: Float[Array, " F"] | None = None
    down_bias: Float[Array, " D"] | None = None

    @staticmethod
    def specs(config: MLPConfig) -> dict[str, ParamSpec]:
        """The parameters that `config` asks for, by name.

        Weights are drawn with variance 1 / fan-in, which keeps unit variance through each projection and is
        the default of Flax's own Linear; biases start at zero.
        """
        D, F = config.embed_dim, config.hidden_dim
        weight, zeros = jax.nn.initializers.lecun_normal(), jax.nn.initializers.zeros
        specs = {
            "gate_proj": ParamSpec((D, F), ("embed", "mlp"), weight),
            "up_proj": ParamSpec((D, F), ("embed", "mlp"), weight),
            "down_proj": ParamSpec((F, D), ("mlp", "embed"), weight),
        }
        if config.use_bias:
            specs["gate_bias"] = ParamSpec((F,), ("mlp",), zeros)
            specs["up_bias"] = ParamSpec((F,), ("mlp",), zeros)
            specs["down_bias"] = ParamSpec((D,), ("embed",), zeros)
        return specs

    @classmethod
    def init(cls, config: MLPConfig, key: Key[Array, ""]) -> "MLPParams":
        """Fresh parameters in `config.param_dtype`."""
        return cls(**_init(cls.specs(config), config, key))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMSNormParams:
    """The norm's `scale` stores w; the factor is 1 + w."""

    scale: Float[Array, " D"]

    @staticmethod
    def specs(config: MLPConfig) -> dict[str, ParamSpec]:
        """The norm's one parameter. Zero, so that the factor starts at 1."""
        return {"scale": ParamSpec((config.embed_dim,), ("embed",), jax.nn.initializers.zeros)}

    @classmethod
    def init(cls, config: MLPConfig, key: Key[Array, ""]) -> "RMSNormParams":
        """Fresh parameters in `config.param_dtype`."""
        return cls(**_init(cls.specs(config), config, key))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLPBlockParams:
    """Parameters of `x + post_norm(mlp(pre_norm(x)))`; `post_norm` is None where the model has none."""

    pre_norm: RMSNormParams
    mlp: MLPParams
    post_norm: RMSNormParams | None = None

    @classmethod
    def specs(cls, config: MLPConfig) -> "MLPBlockParams":
        """The same tree with a `ParamSpec` for each array, for :func:`gemma_mlp.sharding.named_shardings`."""
        norm: Any = RMSNormParams.specs(config)
        mlp: Any = MLPParams.specs(config)
        return cls(RMSNormParams(**norm), MLPParams(**mlp), RMSNormParams(**norm) if config.post_norm else None)

    @classmethod
    def init(cls, config: MLPConfig, key: Key[Array, ""]) -> "MLPBlockParams":
        """Fresh parameters in `config.param_dtype`."""
        return cls(
            pre_norm=RMSNormParams.init(config, key),
            mlp=MLPParams.init(config, key),
            post_norm=RMSNormParams.init(config, key) if config.post_norm else None,
        )


def _init(specs: dict[str, ParamSpec], config: MLPConfig, key: Key[Array, ""]) -> dict[str, Any]:
    keys = jax.random.split(key, len(specs))
    return {name: spec.init(k, spec.shape, config.param_dtype) for k, (name, spec) in zip(keys, specs.items())}
