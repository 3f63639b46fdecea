"""A small Gemma-2-like decoder over bytes, in Flax NNX."""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float, Int

import gemma_mlp
from train_toy import common

Block = Callable[..., nnx.Module]  # (config, rngs=rngs)


def split(init, axes):
    """`init` for a parameter with these logical axes; nothing is placed on a mesh here."""
    return nnx.with_partitioning(init, axes, eager_sharding=False)


class Layer(nnx.Module):
    """Attention between two norms, then the feed-forward block."""

    def __init__(self, config: gemma_mlp.MLPConfig, num_heads: int, *, rngs: nnx.Rngs, block: Block):
        self.attention_pre_norm = gemma_mlp.nnx.RMSNorm(config, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads,
            config.embed_dim,
            use_bias=False,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=split(common.weight_init, common.PROJECTION_AXES),
            out_kernel_init=split(common.weight_init, common.OUT_AXES),
            attention_fn=common.causal_attention,
            decode=False,
            rngs=rngs,
        )
        self.attention_post_norm = gemma_mlp.nnx.RMSNorm(config, rngs=rngs)
        self.mlp_block = block(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.attention_post_norm(self.attention(self.attention_pre_norm(x)))
        return self.mlp_block(x)


class Decoder(nnx.Module):
    """Bytes to next-byte logits; input and output embeddings are tied.

    Args:
      config: sizes and numerics of the feed-forward blocks; the rest of the model follows them.
      num_layers: how many layers.
      num_heads: attention heads of each.
      rngs: `params` draws the weights.
      block: makes the feed-forward block of a layer.
    """

    def __init__(
        self,
        config: gemma_mlp.MLPConfig,
        num_layers: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        block: Block = gemma_mlp.nnx.MLPBlock,
    ):
        self.embed = nnx.Embed(
            common.VOCABULARY,
            config.embed_dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=split(common.embedding_init, common.EMBEDDING_AXES),
            rngs=rngs,
        )
        self.num_layers = num_layers
        for i in range(num_layers):
            setattr(self, f"layer_{i}", Layer(config, num_heads, rngs=rngs, block=block))
        self.final_norm = gemma_mlp.nnx.RMSNorm(config, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        x = self.embed(tokens) * self.embed.features**0.5
        for i in range(self.num_layers):
            x = getattr(self, f"layer_{i}")(x)
        return self.embed.attend(self.final_norm(x))
