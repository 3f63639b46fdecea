"""What the NNX and the Linen decoder share: vocabulary, initialisers, logical axes, and causal attention."""

import jax
import jax.numpy as jnp

VOCABULARY = 256  # one token for each value of a byte

# Logical axes of the weights that are not gemma_mlp's. Placement.rules maps them to mesh axes.
PROJECTION_AXES = ("embed", "heads", None)  # query, key and value: [D, N, H]
OUT_AXES = ("heads", None, "embed")  # [N, H, D]
EMBEDDING_AXES = ("vocabulary", "embed")

weight_init = jax.nn.initializers.lecun_normal()
embedding_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


def causal_attention(query_BTNH, key_BTNH, value_BTNH, **_):
    """softmax(q k^T / sqrt(H)) v over a position and those before it, with rotary embeddings (arXiv:2104.09864).

    Both of Flax's attention modules take it as their `attention_fn`.
    """
    return jax.nn.dot_product_attention(rotate(query_BTNH), rotate(key_BTNH), value_BTNH, is_causal=True)


def rotate(x_BTNH):
    """Rotates pair i of position t by the angle t / 10000^(2i/H)."""
    length, head_dim = x_BTNH.shape[-3], x_BTNH.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angle_T1H = jnp.arange(length)[:, None, None] * frequency
    sin, cos = jnp.sin(angle_T1H).astype(x_BTNH.dtype), jnp.cos(angle_T1H).astype(x_BTNH.dtype)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
