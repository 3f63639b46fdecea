"""The NNX shell: modules that hold and name parameters. The arithmetic is in gemma_mlp.block and gemma_mlp.op."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from gemma_mlp.adopt import adopt, qwix_rule, refuse_qwix
from gemma_mlp.block import add_branch, rms_norm
from gemma_mlp.config import MLPConfig
from gemma_mlp.op.api import mlp, mlp_hidden
from gemma_mlp.params import MLPParams, RMSNormParams, named_leaves
from gemma_mlp.sharding import leaf_rules

__all__ = ["MLP", "MLPBlock", "RMSNorm", "adopt"]


class MLP(nnx.Module):
    """Gemma's gated MLP; formula, shapes and errors as in :func:`gemma_mlp.feed_forward`.

    Parameters are `gate_proj` [D, F], `up_proj` [D, F], `down_proj` [F, D] and, with `config.use_bias`,
    `gate_bias` [F], `up_bias` [F], `down_bias` [D], annotated with the logical axes `embed` and `mlp`. There is RNG
    state only if `config.dropout_rate` is positive. Under `nnx.capture(..., nnx.Intermediate)` the hidden activations
    are sown as `hidden`.

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
        refuse_qwix(qwix_rule(self))
        params = MLPParams(**{name: getattr(self, name)[...] for name in named_leaves(MLPParams.specs(self.config))})
        key = self._dropout_key(self.deterministic if deterministic is None else deterministic, rngs)
        # `__captures__` is what nnx.capture sets. Outside of it, flax before 0.12.12 turns `sow` into a new attribute.
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "hidden", mlp_hidden(params, x, self.config, dropout_key=key))
        return mlp(params, x, self.config, dropout_key=key)

    def set_view(self, deterministic: bool | None = None):
        """Switches dropout off or on; `nnx.view(model, deterministic=...)` calls this."""
        if deterministic is not None:
            self.deterministic = deterministic

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

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result is in `config.dtype`."""
        return rms_norm(self.scale[...], x, eps=self.config.norm_eps, dtype=self.config.dtype)


class MLPBlock(nnx.Module):
    """x + post_norm(mlp(pre_norm(x))), as in :func:`gemma_mlp.mlp_block`.

    The block reads the `scale` of its two norms and does not call them.

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
        return add_branch(
            x,
            lambda x: self.mlp(x, **given),
            pre_scale=self.pre_norm.scale[...],
            post_scale=self.post_norm.scale[...] if self.post_norm is not None else None,
            config=self.config,
        )


def _add_params(module: nnx.Module, specs: MLPParams | RMSNormParams, config: MLPConfig, rngs: nnx.Rngs) -> None:
    for name, spec in named_leaves(specs).items():
        value = spec.init(rngs.params(), spec.shape, config.param_dtype)
        # Nothing is sharded here: a model is made with or without a mesh. The rules tell Flax what the names stand for.
        names: dict[str, Any] = {"out_sharding": spec.axes, "eager_sharding": False}
        if config.axis_rules is not None:
            names["sharding_rules"] = leaf_rules(spec.axes, config.axis_rules)
        setattr(module, name, nnx.Param(value, **names))
