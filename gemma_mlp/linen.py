"""The Linen shell: modules that hold and name parameters. The arithmetic is in gemma_mlp.block and gemma_mlp.op."""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from gemma_mlp.block import add_branch, rms_norm
from gemma_mlp.config import MLPConfig
from gemma_mlp.op.api import mlp, mlp_hidden
from gemma_mlp.params import LeafSpec, MLPParams, RMSNormParams, named_leaves


class MLP(nn.Module):
    """Gemma's gated MLP; formula, shapes and errors as in :func:`gemma_mlp.feed_forward`.

    Parameters are `gate_proj` [D, F], `up_proj` [D, F], `down_proj` [F, D] and, with `config.use_bias`,
    `gate_bias` [F], `up_bias` [F], `down_bias` [D], boxed with the logical axes `embed` and `mlp`. With
    `mutable=["intermediates"]` the hidden activations are sown as `hidden`.

    Attributes:
      config: sizes and numerics.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], deterministic: bool = False) -> Float[Array, "*B D"]:
        """Applies the MLP.

        Args:
          x: [*B, D].
          deterministic: True switches dropout off; otherwise a positive dropout_rate needs a `dropout` RNG.
        """
        params = MLPParams(**_params(self, MLPParams.specs(self.config), self.config))
        active = self.config.dropout_rate > 0 and not deterministic
        key = self.make_rng("dropout") if active else None
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "hidden", mlp_hidden(params, x, self.config, dropout_key=key))
        return mlp(params, x, self.config, dropout_key=key)


class RMSNorm(nn.Module):
    """Gemma's RMSNorm over `config.embed_dim`, with one parameter `scale` [D]; see :func:`gemma_mlp.rms_norm`."""

    config: MLPConfig

    def setup(self):
        self.scale = _params(self, RMSNormParams.specs(self.config), self.config)["scale"]

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result is in `config.dtype`."""
        config = self.config
        return rms_norm(self.scale, x, eps=config.norm_eps, dtype=config.dtype, scale_plus_one=config.scale_plus_one)


class MLPBlock(nn.Module):
    """x + post_norm(mlp(pre_norm(x))), as in :func:`gemma_mlp.mlp_block`.

    The block reads the `scale` of its two norms and does not call them.

    Attributes:
      config: sizes and numerics; `post_norm=False` leaves the second norm out, as in Gemma 1.
    """

    config: MLPConfig

    def setup(self):
        self.pre_norm = RMSNorm(self.config)
        self.mlp = MLP(self.config)
        self.post_norm = RMSNorm(self.config) if self.config.post_norm else None

    def __call__(self, x: Float[Array, "*B D"], deterministic: bool = False) -> Float[Array, "*B D"]:
        """Applies the block to the residual stream; arguments as for :meth:`MLP.__call__`."""
        return add_branch(
            x,
            lambda x: self.mlp(x, deterministic),
            pre_scale=self.pre_norm.scale,
            post_scale=self.post_norm.scale if self.post_norm is not None else None,
            config=self.config,
        )


class LogicalAxes(nn.LogicallyPartitioned):
    """Logical axis names that `nnx.bridge` can carry over to NNX without a mesh."""

    def to_nnx_metadata(self) -> dict[str, Any]:
        return super().to_nnx_metadata() | {"eager_sharding": False}


def _params(module: nn.Module, specs: MLPParams | RMSNormParams, config: MLPConfig) -> dict[str, Any]:
    def boxed(spec: LeafSpec):
        return lambda key, shape, dtype: LogicalAxes(spec.init(key, shape, dtype), spec.axes)

    leaves = named_leaves(specs).items()
    return {name: module.param(name, boxed(spec), spec.shape, config.param_dtype) for name, spec in leaves}
