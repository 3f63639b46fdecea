"""Draws text from a language model."""

import jax
import jax.numpy as jnp
import numpy as np
from byte_decoder.language_model import LanguageModel, Params

TEMPERATURE = 0.8


def continue_text(model: LanguageModel, params: Params, context: np.ndarray, length: int, key: jax.Array) -> bytes:
    """Draws `length` bytes that follow `context` [T]. The model sees the last T bytes at every step."""

    @jax.jit
    def draw(params, context):
        def step(window, key):
            logits = model.logits(params, window[None])[0, -1].astype("float32")
            token = jax.random.categorical(key, logits / TEMPERATURE).astype(window.dtype)
            return jnp.append(window[1:], token), token

        return jax.lax.scan(step, context, jax.random.split(key, length))[1]

    return bytes(np.asarray(draw(params, jnp.asarray(context, "int32")), np.uint8))
