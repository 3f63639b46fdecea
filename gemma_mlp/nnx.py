"""The NNX shell: modules that hold and name parameters. The arithmetic is in gemma_mlp.block and gemma_mlp.op."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gemma_mlp.activations import ACTIVATIONS
from gemma_mlp.adopt import adopt, qwix_rule, refuse_qwix
from gemma_mlp.block import add_modules, rms_norm
from gemma_mlp.config import MLPConfig
from gemma_mlp.dtypes import accumulation_dtype, compute_dtype
from gemma_mlp.nnx_convert import (
    add_lora,
    dequantize,
    extract_adapters,
    insert_adapters,
    merge_lora,
    quantize,
    remove_lora,
)
from gemma_mlp.nnx_weights import (
    QuantizedParam,
    QuantizedProjection,
    add_variables,
    get_params,
    set_params,
    weight_of,
)
from gemma_mlp.op.api import mlp, mlp_hidden
from gemma_mlp.params import BIASES, WEIGHTS, MLPParams, RMSNormParams, named_leaves
from gemma_mlp.weights import dense

__all__ = ["MLP", "MLPBlock", "QuantizedParam", "QuantizedProjection", "RMSNorm", "adopt"]
__all__ += ["add_lora", "dequantize", "extract_adapters", "get_params", "insert_adapters", "merge_lora", "quantize"]
__all__ += ["remove_lora", "set_params"]


class MLP(nnx.Module):
    """Gemma's gated MLP; formula, shapes and errors as in :func:`gemma_mlp.feed_forward`.

    Parameters are `gate_proj` [D, F], `up_proj` [D, F], `down_proj` [F, D] and, with `config.use_bias`,
    `gate_bias` [F], `up_bias` [F], `down_bias` [D], annotated with the logical axes `embed` and `mlp`. There is RNG
    state only if `config.dropout_rate` is positive. With `config.weight_dtype` each weight is a module of two arrays,
    `gate_proj.qvalue` and `gate_proj.scale`; with `config.lora` there are also `gate_proj_lora_a` [D, rank],
    `gate_proj_lora_b` [rank, F] and so on, each an `nnx.LoRAParam`.

    Under `nnx.capture(..., nnx.Intermediate)` the hidden activations are sown as `hidden`.

    A projection may be replaced by a module, such as an `nnx.LoRALinear`. The three projections are then called (the
    bias of this module, if it has one, is added), without the savings of :func:`gemma_mlp.feed_forward`.

    Args:
      config: sizes and numerics.
      rngs: `params` draws the weights, `dropout` the masks.
    """

    gate_proj: nnx.Param
    up_proj: nnx.Param
    down_proj: nnx.Param

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.deterministic = False
        self.rngs = rngs.dropout.fork() if config.dropout_rate > 0 else nnx.data(None)
        _add_params(self, MLPParams.specs(config), config, rngs)

    def __call__(
        self,
        x: Float[Array, "*B D"],
        deterministic: bool | None = None,
        *,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Float[Array, "*B D"]:
        """Applies the MLP.

        Args:
          x: [*B, D].
          deterministic: True switches dropout off; None: as `train()` and `eval()` set it.
          rngs: draws the dropout mask instead of the module's own stream.
        """
        key = self._dropout_key(self.deterministic if deterministic is None else deterministic, rngs)
        weights: dict[str, Any] = {name: weight_of(self, name) for name in WEIGHTS}
        if any(weight is None for weight in weights.values()):
            return self._by_calls(x, key)
        refuse_qwix(qwix_rule(self))
        biases = BIASES if self.config.use_bias else ()
        params = MLPParams(**weights, **{name: getattr(self, name)[...] for name in biases})
        # `__captures__` is what nnx.capture sets. Outside of it, flax before 0.12.12 turns `sow` into a new attribute.
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "hidden", mlp_hidden(params, x, self.config, dropout_key=key))
        return mlp(params, x, self.config, dropout_key=key)

    def set_view(self, deterministic: bool | None = None):
        """Switches dropout off or on; `nnx.view(model, deterministic=...)` calls this."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _by_calls(self, x, key):
        """The same, by the calls of projections that are modules by now; JAX differentiates them."""
        config = self.config

        def project(name, x):
            projection, bias = getattr(self, f"{name}_proj"), getattr(self, f"{name}_bias", None)
            weight = weight_of(self, f"{name}_proj")
            if weight is None:
                y = projection(x)
            else:
                dtype = compute_dtype(config.dtype, x=x, weight=weight)
                y = jnp.matmul(x.astype(dtype), dense(weight, dtype))
            return y if bias is None else y + bias[...].astype(y.dtype)

        gate, up = project("gate", x), project("up", x)
        wide = accumulation_dtype(gate.dtype, up.dtype)
        hidden = ACTIVATIONS[config.activation].gated(gate.astype(wide), up.astype(wide))
        if key is not None:
            keep = jax.random.bernoulli(key, 1 - config.dropout_rate, hidden.shape)
            hidden = jnp.where(keep, hidden / (1 - config.dropout_rate), 0)
        hidden = hidden.astype(gate.dtype)
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "hidden", hidden)
        return project("down", hidden)

    def _dropout_key(self, deterministic: bool, rngs: nnx.Rngs | nnx.RngStream | None):
        if self.config.dropout_rate == 0 or deterministic:
            return None
        stream = rngs if rngs is not None else self.rngs
        assert stream is not None  # made at construction, since dropout_rate > 0
        return stream.dropout() if isinstance(stream, nnx.Rngs) else stream()


class RMSNorm(nnx.Module):
    """Gemma's RMSNorm over `config.embed_dim`, with one parameter `scale` [D]; see :func:`gemma_mlp.rms_norm`."""

    scale: nnx.Param

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        self.config = config
        _add_params(self, RMSNormParams.specs(config), config, rngs)

    def __call__(self, x: Float[Array, "*B D"], *, dtype: Any = None) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result is in `dtype`, or else in `config.dtype`."""
        config = self.config
        dtype = dtype or config.dtype
        return rms_norm(self.scale[...], x, eps=config.norm_eps, dtype=dtype, scale_plus_one=config.scale_plus_one)


_OWN_CALL = RMSNorm.__call__  # which a subclass replaces, and `nnx.capture(..., method_outputs=...)` as long as it runs


class MLPBlock(nnx.Module):
    """x + post_norm(mlp(pre_norm(x))), as in :func:`gemma_mlp.mlp_block`.

    The norms and the MLP may be replaced by other modules, which are called: a norm with its input alone, the MLP with
    its input and with those of `deterministic` and `rngs` that the block's call was given. This package's own norms are
    computed together with the casts around them, by their `scale`, and called only if somebody captures their outputs.

    Args:
      config: sizes and numerics; `post_norm=False` leaves the second norm out, as in Gemma 1.
      rngs: `params` draws the weights, `dropout` the masks.
    """

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.pre_norm = RMSNorm(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.post_norm = RMSNorm(config, rngs=rngs) if config.post_norm else nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "*B D"],
        deterministic: bool | None = None,
        *,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Float[Array, "*B D"]:
        """Applies the block to the residual stream; arguments as for :meth:`MLP.__call__`."""
        # Only what was given is passed on: `self.mlp` may be another module by now, such as `nnx.LoRA` around an MLP.
        options = {"deterministic": deterministic, "rngs": rngs}
        given = {name: option for name, option in options.items() if option is not None}
        return add_modules(
            x,
            self.pre_norm,
            lambda x: self.mlp(x, **given),
            self.post_norm,
            own_norm=RMSNorm,
            scale_of=_own_scale,
            config=self.config,
        )


def _own_scale(norm: Any) -> Float[Array, " D"] | None:
    """The scale of a norm that the block computes itself; None if there is no norm, or it has to be called."""
    return norm.scale[...] if type(norm).__call__ is _OWN_CALL else None


def _add_params(module: nnx.Module, specs: MLPParams | RMSNormParams, config: MLPConfig, rngs: nnx.Rngs) -> None:
    for name, spec in named_leaves(specs).items():
        add_variables(module, name, spec, config, rngs)
