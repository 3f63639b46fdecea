"""A small Gemma-2-like decoder over bytes, in Flax NNX."""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float, Int

import gemma_mlp
from toy.common import VOCABULARY, causal_attention

Block = Callable[..., nnx.Module]  # (config, rngs=rngs)


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
            attention_fn=causal_attention,
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
            VOCABULARY, config.embed_dim, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
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
