"""The float64 NumPy oracle: Gemma's feed-forward and its gradients, written from the formulas alone.

Shares no code with the package. `stored` is applied to every array that an implementation has to store, so that
with `stored=bfloat16` the oracle gives the error that rounding those arrays once makes unavoidable: the floor.
"""

import math

import ml_dtypes
import numpy as np
from scipy.special import erf


def exact(a):
    return a


def bfloat16(a):
    """`a` rounded once to bfloat16."""
    return np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def d_gelu_tanh(x):
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


def d_gelu(x):
    return 0.5 * (1 + erf(x / math.sqrt(2))) + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


ACTIVATIONS = {  # name: (value, derivative)
    "gelu_tanh": (gelu_tanh, d_gelu_tanh),
    "gelu": (lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))), d_gelu),
    "silu": (lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x)))),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
    "identity": (lambda x: x, np.ones_like),
}


def mlp(params, x, activation, stored=exact, between=exact):
    """y [*B, D] and everything the gradients need. `params`: a dict of float64 arrays.

    `between` is applied to gate and up (and to dh in the gradients), which only some platforms store between matmuls.
    """
    act, _ = ACTIVATIONS[activation]
    gate = between(x @ params["gate_proj"] + params.get("gate_bias", 0))
    up = between(x @ params["up_proj"] + params.get("up_bias", 0))
    h = stored(act(gate) * up)
    y = stored(h @ params["down_proj"] + params.get("down_bias", 0))
    return y, (gate, up, h)


def mlp_gradients(params, x, dy, activation, stored=exact, saved=exact, weights=None, between=exact):
    """(gradients of the parameters, gradient of x) for the cotangent `dy`.

    `saved` is applied to the gate and up that the backward pass starts from, `weights` (by default `stored`) to the
    gradients of the parameters.
    """
    weights = weights or stored
    h, dgate, dup = hidden_gradients(params, x, dy, activation, stored, saved, between)
    grads = {
        "gate_proj": weights(outer(x, dgate)),
        "up_proj": weights(outer(x, dup)),
        "down_proj": weights(outer(h, dy)),
        "gate_bias": weights(total(dgate)),
        "up_bias": weights(total(dup)),
        "down_bias": weights(total(dy)),
    }
    dx = stored(dgate @ params["gate_proj"].T + dup @ params["up_proj"].T)
    return {name: grads[name] for name in params}, dx


def dequantized(qvalue, scale):
    """qvalue [in, out] with one row of scales for each group along `in`."""
    return np.asarray(qvalue, np.float64) * np.repeat(scale, len(qvalue) // len(scale), axis=0)


def adapted(base, lora_a, lora_b, factor):
    return base + factor * (lora_a @ lora_b)


def lora_gradients(x, dy, lora_a, lora_b, factor, stored=exact):
    """(gradient of lora_a, gradient of lora_b) for the gradient dy of x (base + factor lora_a lora_b)."""
    low, dlow = stored(factor * (x @ lora_a)), stored(factor * (dy @ lora_b.T))
    return stored(outer(x, dlow)), stored(outer(low, dy))


def hidden_gradients(params, x, dy, activation, stored=exact, saved=exact, between=exact):
    """h and the gradients of gate and up, as :func:`mlp_gradients` has them."""
    act, d_act = ACTIVATIONS[activation]
    _, (gate, up, _) = mlp(params, x, activation, between=between)
    gate, up = saved(gate), saved(up)
    dh = between(dy @ params["down_proj"].T)
    return stored(act(gate) * up), stored(dh * up * d_act(gate)), stored(dh * act(gate))


def rms_norm(scale, x, eps, scale_plus_one=True):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * (1 + scale if scale_plus_one else scale)


def rms_norm_gradients(scale, x, dy, eps, scale_plus_one=True):
    """(gradient of scale, gradient of x)."""
    rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    normed, weighted = x / rms, dy * (1 + scale if scale_plus_one else scale)
    return total(dy * normed), (weighted - normed * np.mean(weighted * normed, axis=-1, keepdims=True)) / rms


def block(params, x, activation, eps, stored=exact, scale_plus_one=True, between=exact):
    """x + post_norm(mlp(pre_norm(x))); `params` as {"pre_norm": scale, "mlp": {...}, "post_norm": scale or None}."""
    normed = stored(rms_norm(params["pre_norm"], x, eps, scale_plus_one))
    y, _ = mlp(params["mlp"], normed, activation, stored, between)
    if params["post_norm"] is not None:
        y = rms_norm(params["post_norm"], y, eps, scale_plus_one)
    return stored(x + y)


def block_gradients(params, x, dy, activation, eps, stored=exact, scale_plus_one=True, between=exact):
    """(gradients of the parameters, gradient of x); every array between the norms and the MLP is stored."""
    normed = stored(rms_norm(params["pre_norm"], x, eps, scale_plus_one))
    d_post, dbranch = None, dy
    if params["post_norm"] is not None:
        y, _ = mlp(params["mlp"], normed, activation, stored, between)
        d_post, dbranch = rms_norm_gradients(params["post_norm"], y, dy, eps, scale_plus_one)
    d_mlp, dnormed = mlp_gradients(params["mlp"], normed, stored(dbranch), activation, stored, between=between)
    d_pre, dx = rms_norm_gradients(params["pre_norm"], x, dnormed, eps, scale_plus_one)
    d_post = None if d_post is None else stored(d_post)
    return {"pre_norm": stored(d_pre), "mlp": d_mlp, "post_norm": d_post}, stored(dy + dx)


def outer(a, b):
    """a^T b, summed over all leading axes."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def total(a):
    return a.reshape(-1, a.shape[-1]).sum(axis=0)


def relative_error(value, expected):
    """|value - expected| / |expected| in the L2 norm; 0 where both are empty or zero."""
    difference = np.linalg.norm(np.asarray(value, np.float64) - expected)
    return float(difference / np.linalg.norm(expected)) if difference else 0.0
