"""Which kernels an accelerator has, what they serve, and the feed-forward in their terms."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_mlp.activations import Activation
from gemma_mlp.checks import require
from gemma_mlp.mesh import Rules
from gemma_mlp.op import tpu, tpu_gradients
from gemma_mlp.op.device import target_device
from gemma_mlp.op.split import Split, mesh_to_split
from gemma_mlp.params import MLPParams

Kernels = Literal["tpu", "gpu"]


def choose(
    params: MLPParams, dtype: Any, activation: Activation, dropout_rate: float, save: str, rules: Rules | None
) -> Kernels:
    """The kernels of the device that is compiled for.

    Raises:
      ValueError: if there are none, or they do not serve the case.
    """
    platform = target_device().platform
    kernels: dict[str, Kernels] = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
    _require(
        platform in kernels,
        "runs on TPUs and on NVIDIA's GPUs",
        f"a program for {platform}",
        "to compile ahead of time for another platform, call jax.set_mesh with a mesh of its devices",
    )
    _require(dtype != jnp.float64, "computes in bfloat16 or float32", "float64")
    _require(kernels[platform] == "gpu" or activation != "gelu", "has no erfc on TPUs", "activation 'gelu'")
    _require(dropout_rate == 0, "has no dropout", f"dropout_rate {dropout_rate}")
    _require(params.gate_bias is None, "has no biases, as Gemma has none", "biases")
    _require(save != "autodiff", "has a backward pass of its own", f"save={save!r}", "use save='input' or 'gate_up'")
    _require(
        mesh_to_split() is None or rules is not None,
        "runs on a mesh of several devices where axis_rules say what is split",
        "axis_rules None",
        "gemma_mlp.sharding.RULES is an example",
    )
    return kernels[platform]


def feed_forward(
    params: MLPParams, x: Float[Array, "*B D"], *, activation: Activation, keep: bool, rules: Rules | None
) -> tuple[Array, ...]:
    """y [*B, D] and, to `keep`, gate and up [*B, F], in the dtype of x, on a TPU."""
    split = Split(x.shape, params.gate_proj.shape[1], rules)

    def compute(x, *weights):
        results = tpu.feed_forward(_rows(x), *weights, activation=activation, keep=keep)
        y, *gate_up = (_as_tokens(a, x) for a in results)
        return split.add_over_hidden(y), *gate_up

    out_specs = [split.stream, *[split.hidden] * (2 if keep else 0)]
    return split.run(compute, [split.rows, *split.weights], out_specs, x, *_weights(params))


def hidden(
    kernels: Kernels,
    params: MLPParams,
    x: Float[Array, "*B D"],
    *,
    activation: Activation,
    keep: bool,
    rules: Rules | None,
) -> tuple[Float[Array, "*B F"], ...]:
    """h and, to `keep` on a GPU, gate and up, in the dtype of x; a GPU has wider weights rounded to it first."""
    split = Split(x.shape, params.gate_proj.shape[1], rules)

    def on_tpu(x, *weights):
        assert not keep  # of a forward pass all is one kernel
        return (_as_tokens(tpu.hidden(_rows(x), *weights, activation=activation), x),)

    def on_gpu(x, *weights):
        from gemma_mlp.op import gpu  # what it imports is not in JAX on every system

        weights = [weight.astype(x.dtype) for weight in weights]
        results = gpu.hidden(_rows(x), *weights, activation=activation, keep=keep)
        return tuple(_as_tokens(a, x) for a in results)

    out_specs = [split.hidden] * (3 if keep else 1)
    compute = {"tpu": on_tpu, "gpu": on_gpu}[kernels]
    return split.run(compute, [split.rows, *split.weights[:2]], out_specs, x, *_weights(params)[:2])


def hidden_gradients(
    params: MLPParams,
    dy: Float[Array, "*B D"],
    gate: Float[Array, "*B F"],
    up: Float[Array, "*B F"],
    *,
    activation: Activation,
    rules: Rules | None,
) -> tuple[Float[Array, "*B F"], ...]:
    """h and the gradients of gate and up, in the dtype of dy, on a GPU."""
    split = Split(dy.shape, gate.shape[-1], rules)

    def compute(dy, down_proj, *gate_up):
        from gemma_mlp.op import gpu

        rows = _rows(dy), down_proj.astype(dy.dtype), *map(_rows, gate_up)
        return tuple(_as_tokens(a, dy) for a in gpu.hidden_gradients(*rows, activation=activation))

    in_specs = [split.rows, split.weights[2], split.hidden, split.hidden]
    return split.run(compute, in_specs, [split.hidden] * 3, dy, params.down_proj, gate, up)


def gradients(
    params: MLPParams, x: Float[Array, "*B D"], dy: Float[Array, "*B D"], *, activation: Activation, rules: Rules | None
) -> tuple[MLPParams, Float[Array, "*B D"]]:
    """The gradients of the weights, in their dtypes, and of x, in float32, on a TPU."""
    split = Split(x.shape, params.gate_proj.shape[1], rules)

    def compute(x, dy, gate_proj, up_proj, down_proj):
        dx, *dweights = tpu_gradients.gradients(
            _rows(x), _rows(dy), gate_proj, up_proj, down_proj, activation=activation
        )
        sums = [split.add_over_tokens(dweight, axis) for dweight, axis in zip(dweights, (0, 0, 1))]
        return split.add_over_hidden(dx.reshape(x.shape)), *sums

    in_specs = [split.rows, split.rows, *split.weights]
    dx, *dweights = split.run(compute, in_specs, [split.stream, *split.dweights], x, dy, *_weights(params))
    return MLPParams(*dweights), dx


def gradients_from_kept(
    params: MLPParams,
    dy: Float[Array, "*B D"],
    gate: Float[Array, "*B F"],
    up: Float[Array, "*B F"],
    *,
    activation: Activation,
    rules: Rules | None,
) -> tuple[Float[Array, "*B F"], Float[Array, "*B F"], Float[Array, "F D"]]:
    """The gradients of gate and up, in their dtype, and of down_proj, in its, on a TPU."""
    split = Split(dy.shape, gate.shape[-1], rules)

    def compute(dy, gate, up, down_proj):
        dgate, dup, ddown_proj = tpu_gradients.gradients_from_kept(
            _rows(dy), _rows(gate), _rows(up), down_proj, activation=activation
        )
        return _as_tokens(dgate, dy), _as_tokens(dup, dy), split.add_over_tokens(ddown_proj, 1)

    in_specs = [split.rows, split.hidden, split.hidden, split.weights[2]]
    out_specs = [split.hidden, split.hidden, split.dweights[2]]
    return split.run(compute, in_specs, out_specs, dy, gate, up, params.down_proj)


def _weights(params):
    return [params.gate_proj, params.up_proj, params.down_proj]


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _as_tokens(rows, x):
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _require(condition, rule, received, fix="use implementation='xla'"):
    require(condition, f"implementation='pallas' {rule}.", received, f"{fix}.")
