"""Random inputs whose values every dtype under test can represent, and their float64 copies for the oracle."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma_mlp.params import MLPBlockParams, MLPParams, RMSNormParams

BATCHES = ((), (3,), (2, 3), (0,))


def normal(rng, shape, scale=1.0):
    """float64 numbers that bfloat16 represents."""
    return (rng.standard_normal(shape) * scale).astype(ml_dtypes.bfloat16).astype(np.float64)


def mlp_arrays(rng, embed_dim, hidden_dim, use_bias):
    arrays = {
        "gate_proj": normal(rng, (embed_dim, hidden_dim), embed_dim**-0.5),
        "up_proj": normal(rng, (embed_dim, hidden_dim), embed_dim**-0.5),
        "down_proj": normal(rng, (hidden_dim, embed_dim), hidden_dim**-0.5),
    }
    if use_bias:
        arrays |= {
            "gate_bias": normal(rng, (hidden_dim,), 0.5),
            "up_bias": normal(rng, (hidden_dim,), 0.5),
            "down_bias": normal(rng, (embed_dim,), 0.5),
        }
    return arrays


def block_arrays(rng, embed_dim, hidden_dim, use_bias, post_norm=True):
    return {
        "pre_norm": normal(rng, (embed_dim,), 0.5),
        "mlp": mlp_arrays(rng, embed_dim, hidden_dim, use_bias),
        "post_norm": normal(rng, (embed_dim,), 0.5) if post_norm else None,
    }


def mlp_params(arrays, dtype):
    return MLPParams(**{name: jnp.asarray(array, dtype) for name, array in arrays.items()})


def block_params(arrays, dtype):
    pre, post = arrays["pre_norm"], arrays["post_norm"]
    return MLPBlockParams(
        RMSNormParams(jnp.asarray(pre, dtype)),
        mlp_params(arrays["mlp"], dtype),
        None if post is None else RMSNormParams(jnp.asarray(post, dtype)),
    )


def value_and_pullback(function, params, x, dy):
    """y and the gradients for the cotangent dy."""
    y, pull_back = jax.vjp(function, params, x)
    return y, *pull_back(jnp.asarray(dy, y.dtype))


def mlp_leaves(params):
    return {name: array for name, array in vars(params).items() if array is not None}


def block_leaves(params):
    """Block parameters, as arrays of :func:`block_arrays` or as MLPBlockParams, by flat name."""
    if isinstance(params, MLPBlockParams):
        post = None if params.post_norm is None else params.post_norm.scale
        params = {"pre_norm": params.pre_norm.scale, "mlp": mlp_leaves(params.mlp), "post_norm": post}
    leaves = dict(params["mlp"], pre_norm=params["pre_norm"], post_norm=params["post_norm"])
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}
