"""The decoder of `byte_decoder.nnx_model` in Flax Linen, with the same parameter tree."""

from flax import linen as nn
from jaxtyping import Array, Float, Int

import gemma_mlp
from byte_decoder import common


class Layer(nn.Module):
    """Attention with a norm before and after it, then the feed-forward block."""

    config: gemma_mlp.MLPConfig
    num_heads: int

    def setup(self):
        config = self.config
        self.attention_pre_norm = gemma_mlp.linen.RMSNorm(config)
        self.attention = nn.MultiHeadDotProductAttention(
            self.num_heads,
            use_bias=False,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=nn.with_logical_partitioning(common.weight_init, common.PROJECTION_AXES),
            out_kernel_init=nn.with_logical_partitioning(common.weight_init, common.OUT_AXES),
            attention_fn=common.causal_attention,
            deterministic=True,
        )
        self.attention_post_norm = gemma_mlp.linen.RMSNorm(config)
        self.mlp_block = gemma_mlp.linen.MLPBlock(config)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.attention_post_norm(self.attention(self.attention_pre_norm(x)))
        return self.mlp_block(x)


class Decoder(nn.Module):
    """Maps bytes to next-byte logits. Input and output embeddings are tied."""

    config: gemma_mlp.MLPConfig
    num_layers: int
    num_heads: int

    def setup(self):
        config = self.config
        self.embed = nn.Embed(
            common.VOCABULARY,
            config.embed_dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nn.with_logical_partitioning(common.embedding_init, common.EMBEDDING_AXES),
        )
        self.layer = [Layer(config, self.num_heads) for _ in range(self.num_layers)]  # called layer_0, layer_1, ...
        self.final_norm = gemma_mlp.linen.RMSNorm(config)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        x = self.embed(tokens) * self.config.embed_dim**0.5
        for layer in self.layer:
            x = layer(x)
        return self.embed.attend(self.final_norm(x))
