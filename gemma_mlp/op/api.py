"""The public feed-forward: checks at the edge, then the kernel."""

import functools
from typing import Any, get_args

import chex
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.checks import describe, ensure_finite, explained, require
from gemma_mlp.config import (
    Implementation,
    Save,
    positive_int,
    require_choice,
    require_dropout_rate,
    require_implementation,
)
from gemma_mlp.dtypes import compute_dtype
from gemma_mlp.mesh import Rules, mesh_axes, placed_automatically, require_rules, spec_of
from gemma_mlp.op import backends, vjp
from gemma_mlp.params import MLPParams


def feed_forward(
    params: MLPParams,
    x: Float[Array, "*B D"],
    *,
    activation: Activation = "gelu_tanh",
    dtype: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    save: Save = "input",
    chunk_size: int | None = None,
    axis_rules: Rules | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B D"]:
    """y = dropout(activation(x W_gate + b_gate) * (x W_up + b_up)) W_down + b_down.

    With `gelu_tanh` and no biases this is Gemma's MLP (arXiv:2403.08295, section 2; Hugging Face's
    `Gemma2MLP`); the other activations give the rest of the GLU family (Shazeer, arXiv:2002.05202).

    Every product takes operands in the compute dtype and accumulates in float32, or as
    `jax.default_matmul_precision` says where the operands are float32; element-wise work is float32. h, y and
    what the backward pass keeps are rounded once to the compute dtype; so are, on TPUs and GPUs, gate, up and
    the gradient of h, which are stored there between the products. Gradients come in the dtype of what they
    belong to.

    Args:
      params: weights, stored (in, out): [D, F], [D, F], [F, D]; cast to the compute dtype for the products.
      x: any leading axes, none and empty ones too: [*B, D].
      activation: `gelu_tanh` (GEGLU as Gemma has it), `gelu` (GEGLU, erf), `silu` (SwiGLU), `relu` (ReGLU),
        `sigmoid` (GLU), `identity` (Bilinear).
      dtype: the compute dtype and the result's: bfloat16, float32 or, in JAX's 64-bit mode, float64. None: the
        common type of `params` and `x`.
      dropout_rate: the share of h that is set to zero, the rest being divided by 1 - dropout_rate. 0, as at
        evaluation, needs no key.
      dropout_key: draws the mask of a positive dropout_rate.
      save: what the backward pass keeps beside `params` and `x`. `input`: nothing; gate and up are computed
        again, two products more. `gate_up`: gate and up in the compute dtype, two [*B, F]. Both support
        reverse mode and forward-over-reverse alone. `autodiff`: what JAX's own differentiation keeps, eight
        [*B, F], seven of them in float32; forward mode (`jax.jvp`, `jax.jacfwd`) works, and bfloat16 gradients
        are rounded at more places.
      chunk_size: for long contexts: how many positions along the second-last axis of x, its length, are computed at
        a time. The forward pass then makes no [*B, F]; nor does the backward pass, which goes through F in as many
        slices (with `gate_up` and `autodiff`, what is kept remains). The result is the same but for the order of
        float32 sums. None: all of them; on a CPU, where no gradient is asked for, what is fastest, 512 tokens at most.
      axis_rules: which axes of the mesh in force (`jax.set_mesh`) each logical axis is split over, to hold XLA to it:
        `gemma_mlp.sharding.RULES` or the like. The first axis of x is `batch`, the second last of three or more
        `length`. None, or no mesh: XLA decides.
      implementation: `xla`: XLA's products, on every backend. `pallas`: the kernels of the device compiled for (the
        mesh's in force, or JAX's default); see :mod:`gemma_mlp.op.tpu` and `pallas_gpu`. Gate, up and
        the gradient of h are not rounded where a kernel has them. On a TPU no [*B, F] is made but what `gate_up`
        keeps, so that there is no `mlp_hidden` to save and chunk_size changes nothing. None: the fastest known, which
        is `xla` until a kernel has been measured on hardware.

    Returns:
      y, [*B, D], in the compute dtype.

    Raises:
      ValueError: if shapes do not fit together, a dtype is not supported, an option is not one of those named, or
        `pallas` has no kernel for the device or the case.
    """
    op = _checked_op(
        params, x, activation, dtype, dropout_rate, dropout_key, save, chunk_size, axis_rules, implementation
    )
    params, x = ensure_finite("params", params), ensure_finite("x", x)
    run = placed_automatically(functools.partial(vjp.feed_forward, op), lambda params, x, key: spec_of(x))
    return ensure_finite("y", run(params, x, dropout_key))


def hidden_activations(
    params: MLPParams,
    x: Float[Array, "*B D"],
    *,
    activation: Activation = "gelu_tanh",
    dtype: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    axis_rules: Rules | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B F"]:
    """h = dropout(activation(x W_gate + b_gate) * (x W_up + b_up)): what :func:`feed_forward` projects down.

    For those who study it: arguments and errors are those of :func:`feed_forward`. With `xla` TPUs and GPUs store and
    round gate and up before h; with `pallas` neither. Gradients are by XLA's products.

    Returns:
      h, [*B, F], in the compute dtype.
    """
    save = "input" if implementation == "pallas" else "autodiff"  # which kernels do not have
    op = _checked_op(params, x, activation, dtype, dropout_rate, dropout_key, save, None, axis_rules, implementation)
    return placed_automatically(functools.partial(vjp.hidden, op), _hidden_spec)(params, x, dropout_key)


def _hidden_spec(params, x, dropout_key) -> PartitionSpec:
    """The leading axes as x has them, the last as the weights have F, which goes first where both ask for an axis."""
    hidden_axes = mesh_axes(spec_of(params.gate_proj)[1])
    lead = (tuple(a for a in mesh_axes(parts) if a not in hidden_axes) for parts in spec_of(x)[:-1])
    return PartitionSpec(*lead, hidden_axes)


def _checked_op(params, x, activation, dtype, dropout_rate, dropout_key, save, chunk_size, axis_rules, implementation):
    require_choice("activation", activation, ACTIVATIONS)
    require_choice("save", save, get_args(Save))
    require_dropout_rate(dropout_rate)
    chunk_size = None if chunk_size is None else positive_int("chunk_size", chunk_size)
    if axis_rules is not None:
        require_rules(axis_rules)
    require(
        isinstance(params, MLPParams),
        "params is an MLPParams.",
        describe(params),
        "MLPParams(**tree) takes the leaves of a module's parameter tree.",
    )
    arrays = {name: array for name, array in vars(params).items() if array is not None}
    dtype = compute_dtype(dtype, x=x, **arrays)
    _check_shapes(arrays, x)
    require(
        dropout_rate == 0 or dropout_key is not None,
        "Dropout draws its mask from a key.",
        f"dropout_rate {dropout_rate} and no dropout_key",
        "pass a dropout_key in training, dropout_rate=0 at evaluation.",
    )
    require_implementation(implementation)
    kernels = None
    if implementation == "pallas" and x.size:
        kernels = backends.choose(params, dtype, activation, dropout_rate, save, axis_rules)
    return vjp.Op(activation, dtype, dropout_rate, save, chunk_size, axis_rules, kernels)


def _check_shapes(arrays: dict[str, Any], x: Any) -> None:
    received = ", ".join(f"{name} {describe(array)}" for name, array in {"x": x, **arrays}.items())
    biases = [name for name in arrays if name.endswith("_bias")]
    require(len(biases) in (0, 3), "The biases are all given or all None.", received, "give the missing ones as zeros.")
    with explained(
        "x is [*B, D], gate_proj and up_proj are [D, F], down_proj is [F, D], gate_bias and up_bias are [F], "
        "down_bias is [D].",
        received,
        "weights are stored (in, out); transpose those of a torch checkpoint, and check embed_dim and hidden_dim.",
    ):
        chex.assert_rank(arrays["gate_proj"], 2)
        embed_dim, hidden_dim = arrays["gate_proj"].shape
        chex.assert_shape(x, (..., embed_dim))
        chex.assert_shape(arrays["up_proj"], (embed_dim, hidden_dim))
        chex.assert_shape(arrays["down_proj"], (hidden_dim, embed_dim))
        if biases:
            chex.assert_shape([arrays["gate_bias"], arrays["up_bias"]], (hidden_dim,))
            chex.assert_shape(arrays["down_bias"], (embed_dim,))
