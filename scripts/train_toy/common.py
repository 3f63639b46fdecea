"""What the NNX and the Linen model share: the vocabulary, the parts of it that are not gemma_mlp's own and how they
are split over a mesh, and the `attention_fn` of Flax's attention modules."""

import jax
import jax.numpy as jnp

VOCABULARY = 256  # one token per byte

# Logical axes of the attention's weights and of the embedding.
PROJECTION_AXES = ("embed", "heads", None)  # [D, N, H], of query, key and value
OUT_AXES = ("heads", None, "embed")
EMBEDDING_AXES = ("vocabulary", "embed")

weight_init = jax.nn.initializers.lecun_normal()
embedding_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


def causal_attention(query_BTNH, key_BTNH, value_BTNH, **_):
    """softmax(q k^T / sqrt(H)) v over the past, with rotary position embeddings (arXiv:2104.09864)."""
    return jax.nn.dot_product_attention(rotate(query_BTNH), rotate(key_BTNH), value_BTNH, is_causal=True)


def rotate(x_BTNH):
    """Rotates pair i of position t by the angle t / 10000^(2i/H)."""
    length, head_dim = x_BTNH.shape[-3], x_BTNH.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angle_T1H = jnp.arange(length)[:, None, None] * frequency
    sin, cos = jnp.sin(angle_T1H).astype(x_BTNH.dtype), jnp.cos(angle_T1H).astype(x_BTNH.dtype)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
