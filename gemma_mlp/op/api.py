"""The public feed-forward: shapes, dtypes and options are checked once, then vjp.py runs."""

import dataclasses
import functools
from typing import Any

import chex
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from gemma_mlp.activations import Activation
from gemma_mlp.checks import describe, ensure_finite, explained, require
from gemma_mlp.config import Implementation, MLPConfig, Save
from gemma_mlp.dtypes import compute_dtype
from gemma_mlp.mesh import Rules, automatic_rules, mesh_axes, placed_automatically, spec_of, vary_alike
from gemma_mlp.op import vjp
from gemma_mlp.op.backend import XLA, Op
from gemma_mlp.op.choose import choose_backend
from gemma_mlp.params import LEAVES, WEIGHTS, MLPParams, named_leaves
from gemma_mlp.weights import LORA, LoRAWeight, known_weight, require_sound


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

    With `gelu_tanh` and no biases this is Gemma's MLP (arXiv:2403.08295, section 2; Hugging Face's `Gemma2MLP`). The
    other activations give the rest of the GLU family (Shazeer, arXiv:2002.05202).

    Every matmul takes operands in the compute dtype and accumulates in float32 (float32 operands are as exact as
    `jax.default_matmul_precision` says). Element-wise work is float32. h, y and what is saved for the backward pass
    are rounded once to the compute dtype. TPUs and GPUs also store gate, up and the gradient of h between matmuls,
    and round them there. Each gradient has the dtype of its own input.

    Args:
      params: weights, stored (in, out): [D, F], [D, F], [F, D]. They are cast to the compute dtype. Each may also be a
        `gemma_mlp.QuantizedWeight`, which has no gradient, or a `gemma_mlp.LoRAWeight`.
      x: [*B, D], with any leading axes, also none or empty ones.
      activation: `gelu_tanh` (GEGLU as in Gemma), `gelu` (GEGLU, erf form), `silu` (SwiGLU), `relu` (ReGLU), `sigmoid`
        (GLU) or `identity` (Bilinear).
      dtype: the dtype of the matmuls and of the result: bfloat16, float32 or, in JAX's 64-bit mode, float64. None: the
        common type of `params` and `x`.
      dropout_rate: the share of h that is set to zero; the rest is divided by 1 - dropout_rate. 0 needs no key.
      dropout_key: draws the mask for a positive dropout_rate.
      save: inside your own `jax.checkpoint`, `nnx.remat` or `nn.remat` use `gate_up`, or any with the policy
        `jax.checkpoint_policies.save_only_these_names("mlp_out")`; with `input` plain remat recomputes gate and up
        twice. What is saved for the backward pass in addition to `params` and `x`. `input`: nothing; gate and up are
        recomputed, which is two more matmuls. `gate_up`: gate and up in the compute dtype, two arrays [*B, F]. Both
        support reverse mode and forward-over-reverse only. `autodiff`: what JAX saves by itself, eight arrays [*B, F],
        seven of them float32; forward mode (`jax.jvp`, `jax.jacfwd`) works, and bfloat16 gradients are rounded in
        more places.
      chunk_size: for long contexts, how many positions along the second last axis of x (its length) to compute at once.
        The forward pass then makes no array [*B, F] (except dropout's mask), and the backward pass goes through F in as
        many slices. (What `gate_up` and `autodiff` save is still saved, and TPU kernels need no chunks.) Only the order
        of float32 sums changes. None: all positions; on a CPU without a mesh, if no gradient is asked for and `save` is
        not `autodiff`, about 512 tokens at once, which is faster.
      axis_rules: which axes of the mesh in force (`jax.set_mesh`) each logical axis is split over, such as
        `gemma_mlp.sharding.RULES`. The first axis of x is `batch`; of three or more, the second last is `length`. None,
        or no mesh: XLA decides.
      implementation: `xla`: XLA's matmuls, on every backend. `pallas`: this package's kernels for the device that the
        program is compiled for (that of the mesh in force, or JAX's default); gemma_mlp/op/README.md says what they
        serve. None: the fastest known, which is `xla` until a kernel has been measured on hardware.

    Returns:
      y, [*B, D], in the compute dtype.

    Raises:
      ValueError: if shapes do not fit together, a dtype is not supported, an option is not one of those named, or
        `pallas` has no kernel for the device or the case.
    """
    config = _config(
        params,
        activation=activation,
        dtype=dtype,
        dropout_rate=dropout_rate,
        save=save,
        chunk_size=chunk_size,
        axis_rules=axis_rules,
        implementation=implementation,
    )
    _require_key(config, dropout_key)
    return mlp(params, x, config, dropout_key=dropout_key)


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

    Arguments and errors are those of :func:`feed_forward`. With `xla`, TPUs and GPUs store and round gate and up before
    h; the kernels of `pallas` do not. XLA computes the gradients.

    Returns:
      h, [*B, F], in the compute dtype.
    """
    config = _config(
        params,
        activation=activation,
        dtype=dtype,
        dropout_rate=dropout_rate,
        axis_rules=axis_rules,
        implementation=implementation,
    )
    _require_key(config, dropout_key)
    return mlp_hidden(params, x, config, dropout_key=dropout_key)


def mlp(
    params: MLPParams, x: Float[Array, "*B D"], config: MLPConfig, *, dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "*B D"]:
    """:func:`feed_forward` with the options of `config`; without a `dropout_key`, dropout is off."""
    return _mlp(config, _require_mlp_params(params), x, dropout_key)


def mlp_hidden(
    params: MLPParams, x: Float[Array, "*B D"], config: MLPConfig, *, dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "*B F"]:
    """:func:`hidden_activations` with the options of `config`; without a `dropout_key`, dropout is off."""
    return _mlp_hidden(config, _require_mlp_params(params), x, dropout_key)


# Under a jit of its own an eager call is one program, and all layers of a model share one trace.
@functools.partial(jax.jit, static_argnums=0)
def _mlp(config, params, x, dropout_key):
    op = _checked_op(params, x, config, dropout_key)
    require(
        op.backend == XLA or config.save != "autodiff",
        "implementation='pallas' has a backward pass of its own, so save must be 'input' or 'gate_up'.",
        repr(config.save),
        "change save, or use implementation='xla'.",
    )
    return _run(vjp.run, op, params, x, dropout_key, "y", lambda params, x, key: spec_of(x))


@functools.partial(jax.jit, static_argnums=0)
def _mlp_hidden(config, params, x, dropout_key):
    op = _checked_op(params, x, config, dropout_key)
    return _run(vjp.run_hidden, op, params, x, dropout_key, "h", _hidden_spec)


def _run(run, op, params, x, dropout_key, name, spec):
    """The result of `run`, which is called `name` in errors, sharded by spec(params, x, dropout_key)."""
    params, x = ensure_finite("params", params), ensure_finite("x", x)
    placed = placed_automatically(functools.partial(run, op), spec)
    return ensure_finite(name, placed(*vary_alike((params, x, dropout_key))))


def _hidden_spec(params, x, dropout_key) -> PartitionSpec:
    """Leading axes are sharded like x, the last like F in the weights. If both use the same mesh axis, F gets it."""
    hidden_axes = mesh_axes(spec_of(jax.tree.leaves(params.gate_proj)[0])[1])
    lead = (tuple(a for a in mesh_axes(axes) if a not in hidden_axes) for axes in spec_of(x)[:-1])
    return PartitionSpec(*lead, hidden_axes)


def _config(params, **options) -> MLPConfig:
    """The options, checked by the config that holds them."""
    shape = getattr(getattr(params, "gate_proj", None), "shape", ())
    embed_dim, hidden_dim = shape if len(shape) == 2 else (1, 1)  # `_checked_op` explains any other params
    return MLPConfig(embed_dim, hidden_dim, **options)


def _require_key(config, dropout_key) -> None:
    require(
        config.dropout_rate == 0 or dropout_key is not None,
        "A positive dropout_rate needs a dropout_key, which draws the mask.",
        f"dropout_rate {config.dropout_rate} and no dropout_key",
        "pass a dropout_key in training, dropout_rate=0 at evaluation.",
    )


def _require_mlp_params(params: Any) -> MLPParams:
    fix = "MLPParams(**tree) takes the leaves of a module's parameter tree."
    require(isinstance(params, MLPParams), "params must be an MLPParams.", describe(params), fix)
    return dataclasses.replace(params, **{name: known_weight(getattr(params, name)) for name in WEIGHTS})


def _checked_op(params, x, config, dropout_key) -> Op:
    config = dataclasses.replace(config, axis_rules=automatic_rules(config.axis_rules))
    leaves = named_leaves(params)
    for name, leaf in leaves.items():
        require_sound(name, leaf)
    adapters = {
        f"{n} {part}": getattr(w, part) for n, w in leaves.items() if isinstance(w, LoRAWeight) for part in LORA
    }
    dtype = compute_dtype(config.dtype, x=x, **leaves, **adapters)
    _check_shapes(leaves, x)
    require(
        config.chunk_size is None or x.ndim < 2 or isinstance(x.shape[-2], int),
        "chunk_size needs to know the length of x (its second last axis) when the program is traced.",
        describe(x),
        "export with a fixed length, or set chunk_size=None.",
    )
    dropout_rate = config.dropout_rate if dropout_key is not None else 0.0
    backend = choose_backend(config, params, x, dtype, dropout_rate) if x.size else XLA
    return Op(config, dtype, dropout_rate, backend)


def _check_shapes(arrays: dict[str, Any], x: Any) -> None:
    received = ", ".join(f"{name} {describe(array)}" for name, array in {"x": x, **arrays}.items())
    biases = [name for name in arrays if name.endswith("_bias")]
    require(
        len(biases) in (0, 3), "The biases must be all given or all None.", received, "give the missing ones as zeros."
    )
    with explained(
        "x must be [*B, D], gate_proj and up_proj [D, F], down_proj [F, D], gate_bias and up_bias [F], down_bias [D].",
        received,
        "weights are stored (in, out); transpose those of a torch checkpoint, and check embed_dim and hidden_dim.",
    ):
        chex.assert_rank(arrays["gate_proj"], 2)
        sizes = dict(zip(LEAVES["gate_proj"], arrays["gate_proj"].shape))
        chex.assert_shape(x, (..., sizes["D"]))
        for name, array in arrays.items():
            chex.assert_shape(array, tuple(sizes[axis] for axis in LEAVES[name]))
