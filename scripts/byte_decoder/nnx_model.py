"""A small Gemma-2-like decoder over bytes, in Flax NNX."""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float, Int

import gemma_mlp
from byte_decoder import common

Block = Callable[..., nnx.Module]  # (config, rngs=rngs)


def with_axes(init, axes):
    """Makes `init` also record the logical axes of the parameter. This places nothing on a mesh."""
    return nnx.with_partitioning(init, axes, eager_sharding=False)


class Layer(nnx.Module):
    """Attention with a norm before and after it, then the feed-forward block."""

    def __init__(self, config: gemma_mlp.MLPConfig, num_heads: int, *, rngs: nnx.Rngs, block: Block):
        self.attention_pre_norm = gemma_mlp.nnx.RMSNorm(config, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads,
            config.embed_dim,
            use_bias=False,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=with_axes(common.weight_init, common.PROJECTION_AXES),
            out_kernel_init=with_axes(common.weight_init, common.OUT_AXES),
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
    """Maps bytes to next-byte logits. Input and output embeddings are tied.

    Args:
      config: sizes and numerics of the feed-forward blocks. The other modules use the same width and dtypes.
      num_layers: the number of layers.
      num_heads: the number of attention heads in a layer.
      rngs: the stream `params` draws the weights.
      block: the class of a layer's feed-forward block, called as block(config, rngs=rngs).
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
            embedding_init=with_axes(common.embedding_init, common.EMBEDDING_AXES),
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
