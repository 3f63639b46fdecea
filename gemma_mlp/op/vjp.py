"""The feed-forward as XLA compiles it on every backend, with its own backward pass.

Every product takes operands in the compute dtype and accumulates in float32; element-wise work is done in
float32; h, y and what the backward pass keeps are rounded once, where they are stored. Accelerators store gate, up
and dh between the products too, so there these are rounded once as well; a CPU keeps them in float32.

With `chunk_size` no [T, F] array exists: the forward pass goes through the tokens in chunks, the backward pass through
F in as many slices, each of which yields its part of every weight's gradient at once and for good.

The optimisation barriers decide what is in memory, the constraints what is sent between the devices of a mesh;
tests/aot holds the compilers to both.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.config import Save
from gemma_mlp.dtypes import accumulation_dtype
from gemma_mlp.mesh import Rules, constrain, count_shards, token_axis
from gemma_mlp.op import backends
from gemma_mlp.op.cpu import LANES, ceil_div, in_slices, multiply, outer, round_up
from gemma_mlp.op.device import target_device
from gemma_mlp.op.split import mesh_to_split
from gemma_mlp.params import MLPParams

V5P = {"TPU v5", "TPU v5p"}  # the device kinds that JAX knows a v5p by
SLICES = 8  # of F in the backward pass around a GPU's kernel
CPU_TOKENS = 512  # of a chunk on a CPU, at most
HIDDEN_AXIS = {"gate_proj": 1, "up_proj": 1, "down_proj": 0, "gate_bias": 0, "up_bias": 0}


class Op(NamedTuple):
    """What is known of a feed-forward when it is traced."""

    activation: Activation
    dtype: Any
    dropout_rate: float
    save: Save
    chunk_size: int | None
    axis_rules: Rules | None = None
    kernels: backends.Kernels | None = None  # instead of XLA's products, where there is one
    on_cpu: bool = False

    @property
    def wide(self):
        """The dtype of sums and of element-wise work."""
        return accumulation_dtype(self.dtype)

    @property
    def stored(self):
        """What products are stored in between element-wise work."""
        return self.wide if self.on_cpu else self.dtype

    @property
    def exact(self):
        """Whether gate, up and dh are float32 in a GPU's memory too, a slice of F at a time: as exact as its kernel.

        With so many slices they take less memory than in bfloat16 at once; slices of what is kept would be copies.
        """
        return self.kernels == "gpu" and self.save == "input"


def feed_forward(
    op: Op, params: MLPParams, x: Float[Array, "*B D"], dropout_key: Key[Array, ""] | None
) -> Float[Array, "*B D"]:
    """y = (activation(x W_gate + b_gate) * (x W_up + b_up)) W_down + b_down, in `op.dtype`."""
    if op.save == "autodiff":
        return _forward(op, params, x, dropout_key, run=_as_on_cpu)[0]
    return _feed_forward(op, params, x, dropout_key)


def hidden(
    op: Op, params: MLPParams, x: Float[Array, "*B D"], dropout_key: Key[Array, ""] | None
) -> Float[Array, "*B F"]:
    """h, in `op.dtype`: what the down projection receives."""
    if op.kernels is not None:
        return _hidden_by_kernel(op, params, x)
    return _by_platform(op, _hidden, params, x, _mask(op, params, x, dropout_key))[0]


def _as_it_is(op, function, *args):
    return function(op, *args)


def _as_on_cpu(op, function, *args):
    """function(op, *args) with nothing rounded between products, wherever it runs."""
    return function(op._replace(on_cpu=True), *args)


def _by_platform(op, function, *args):
    """function(op, *args) as the platform that it is compiled for has it."""
    if op.kernels is not None:
        return function(op, *args)
    on_cpu, elsewhere = functools.partial(_as_on_cpu, op, function), functools.partial(function, op)
    return lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(op, params, x, dropout_key):
    return _by_platform(op, _forward, params, x, dropout_key)[0]


def _feed_forward_forward(op, params, x, dropout_key):
    y_BD, *kept = _forward(op, params, x, dropout_key, run=_by_platform, keep=op.save == "gate_up")
    return y_BD, (params, x, dropout_key, [checkpoint_name(a, n) for a, n in zip(kept, ("mlp_gate", "mlp_up"))])


def _feed_forward_backward(op, residuals, dy_BD):
    params, x, dropout_key, kept = residuals
    if op.kernels == "tpu" and not kept:
        dparams, dx_BD = backends.gradients(
            params, x.astype(op.dtype), dy_BD.astype(op.dtype), activation=op.activation, rules=op.axis_rules
        )
        return dparams, dx_BD.astype(x.dtype), None
    mask = _mask(op, params, x, dropout_key)
    return *_by_platform(op, _gradients, params, x, mask, kept, dy_BD), None


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hidden_by_kernel(op, params, x):
    return _hidden(op, params, x, None)[0]


def _hidden_by_kernel_forward(op, params, x):
    return _hidden_by_kernel(op, params, x), (params, x)


def _hidden_by_kernel_backward(op, residuals, dh_BF):
    by_xla = op._replace(kernels=None)
    return jax.vjp(lambda params, x: _hidden(by_xla, params, x, None)[0], *residuals)[1](dh_BF)


_hidden_by_kernel.defvjp(_hidden_by_kernel_forward, _hidden_by_kernel_backward)


def _forward(op, params, x_BD, dropout_key, *, run=_as_it_is, keep=False):
    """y and, to `keep`, gate and up.

    Args:
      run: how pieces are run, whose tags a user's policy of rematerialisation then finds: :func:`_by_platform`,
        :func:`_as_on_cpu`, or, where all of it is for one platform already, :func:`_as_it_is`.
    """
    x_BD = _as_stream(op, x_BD)
    if op.kernels == "tpu":
        x_BD = x_BD.astype(op.dtype)
        y_BD, *gate_up = backends.feed_forward(params, x_BD, activation=op.activation, keep=keep, rules=op.axis_rules)
        return checkpoint_name(_as_stream(op, y_BD), "mlp_out"), *gate_up
    mask_BF = _mask(op, params, x_BD, dropout_key)

    def compute(x_BD, mask_BF):
        h_BF, *gate_up = run(op, functools.partial(_hidden, keep=keep), params, x_BD, mask_BF)
        h_BF = checkpoint_name(h_BF, "mlp_hidden")
        return checkpoint_name(run(op, _down, params, h_BF), "mlp_out"), *gate_up

    chunk_size = _chunk_size(op, x_BD)
    if chunk_size is None or x_BD.ndim < 2 or x_BD.shape[-2] <= chunk_size:
        return compute(x_BD, mask_BF)
    tokens = Cut(-2, count_shards(token_axis(x_BD.ndim, x_BD.ndim - 2), op.axis_rules))

    def chunk(start, size, results):
        parts = compute(tokens.take(x_BD, start, size), tokens.take(mask_BF, start, size))
        return tuple(tokens.put(whole, part, start) for whole, part in zip(results, parts))

    results = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute, x_BD, mask_BF))
    return in_slices(x_BD.shape[-2] // tokens.shards, ceil_div(chunk_size, tokens.shards), chunk, results)


def _chunk_size(op, x_BD):
    """The positions of a chunk: what is asked for, or on a CPU what is fastest where no gradient needs gate and up.

    More than 32 MiB a CPU's call gets from the system anew, page by page; less the allocator keeps from call to call.
    """
    tokens = math.prod(x_BD.shape[:-1])
    if op.chunk_size is not None or not op.on_cpu or mesh_to_split() is not None or tokens < CPU_TOKENS:
        return op.chunk_size
    # gate and up are in float32 beside h, which in bfloat16 is a third array.
    least = 2 if op.dtype == jnp.bfloat16 else 1
    return ceil_div(x_BD.shape[-2], max(least, ceil_div(tokens, CPU_TOKENS)))


def _hidden(op, params, x, mask_BF, *, keep=False):
    """h and, to `keep`, gate and up, all in the compute dtype."""
    if op.kernels is not None:
        x = x.astype(op.dtype)
        return backends.hidden(op.kernels, params, x, activation=op.activation, keep=keep, rules=op.axis_rules)
    gate_BF = _project(op, op.stored, x, params.gate_proj, params.gate_bias)
    up_BF = _project(op, op.stored, x, params.up_proj, params.up_bias)
    if op.save == "autodiff":  # else they are tagged where they are kept
        gate_BF, up_BF = checkpoint_name(gate_BF, "mlp_gate"), checkpoint_name(up_BF, "mlp_up")
    h_BF = _over_hidden(op, _gated(op, gate_BF.astype(op.wide), up_BF.astype(op.wide), mask_BF).astype(op.dtype))
    # Without the barrier gate and up both stay, for h to be computed inside the down projection.
    kept = (gate_BF.astype(op.dtype), up_BF.astype(op.dtype)) if keep else ()
    return lax.optimization_barrier(h_BF), *kept


def _mask(op, params, x_BD, dropout_key):
    """True where dropout keeps an element of h; None without dropout."""
    if op.dropout_rate == 0:
        return None
    shape = (*x_BD.shape[:-1], params.gate_proj.shape[1])
    return _over_hidden(op, jax.random.bernoulli(dropout_key, 1 - op.dropout_rate, shape))


def _gated(op, gate_BF, up_BF, mask_BF):
    h_BF = ACTIVATIONS[op.activation](gate_BF) * up_BF
    return h_BF if mask_BF is None else jnp.where(mask_BF, h_BF / (1 - op.dropout_rate), 0)


def _down(op, params, h_BF):
    return _as_stream(op, _project(op, op.stored, h_BF, params.down_proj, params.down_bias).astype(op.dtype))


def _gradients(op, params, x_BD, mask_BF, kept, dy_BD):
    """The gradients of the parameters and of x."""
    shards = count_shards("mlp", op.axis_rules)
    hidden_part = params.gate_proj.shape[1] // shards
    slice_size = _slice_size(op, x_BD, hidden_part)
    if slice_size >= hidden_part:
        dparams, dx_BD = _gradients_over_hidden(op, params, x_BD, mask_BF, kept, dy_BD)
    else:
        over_hidden = {name: getattr(params, name) for name in HIDDEN_AXIS}
        cuts = {name: Cut(axis, shards) for name, axis in HIDDEN_AXIS.items()}
        last = Cut(-1, shards)

        def add_slice(start, size, sums):
            part = MLPParams(**{name: cuts[name].take(a, start, size) for name, a in over_hidden.items()})
            mask_part_BF, *kept_part = (last.take(a, start, size) for a in (mask_BF, *kept))
            dpart, dx_part_BD = _gradients_over_hidden(op, part, x_BD, mask_part_BF, kept_part, dy_BD)
            dparams, dx_BD = sums
            dparams = {name: cuts[name].put(a, dpart[name], start) for name, a in dparams.items()}
            return dparams, dx_BD + dx_part_BD

        zeros = jax.tree.map(jnp.zeros_like, over_hidden), jnp.zeros(x_BD.shape, op.wide)
        dparams, dx_BD = in_slices(hidden_part, slice_size, add_slice, zeros)
    dx_BD = dx_BD.astype(x_BD.dtype)
    if op.kernels == "tpu":
        # Without the barrier a loop over layers may carry it in VMEM and copy it out. (XLA's own products lose by it.)
        dx_BD = lax.optimization_barrier(dx_BD)
    return MLPParams(**dparams, down_bias=_total(dy_BD, params.down_bias)), dx_BD


def _gradients_over_hidden(op, params, x_BD, mask_BF, kept, dy_BD) -> tuple[dict[str, Any], Array]:
    """The gradients of the parameters that F is an axis of, by name, and their share of x's, not yet rounded."""
    if op.kernels == "tpu":
        dgate_BF, dup_BF, ddown_FD = backends.gradients_from_kept(
            params, dy_BD.astype(op.dtype), *kept, activation=op.activation, rules=op.axis_rules
        )
    else:
        h_BF, dgate_BF, dup_BF = _hidden_gradients(op, params, x_BD, mask_BF, kept, dy_BD)
        ddown_FD = _outer(op, h_BF, dy_BD, params.down_proj)
    x_BD = _apart(op, x_BD)
    dparams = {
        "gate_proj": _outer(op, x_BD, dgate_BF, params.gate_proj),
        "up_proj": _outer(op, x_BD, dup_BF, params.up_proj),
        "down_proj": ddown_FD,
        "gate_bias": _total(dgate_BF, params.gate_bias),
        "up_bias": _total(dup_BF, params.up_bias),
    }
    dx_BD = _multiply(op, op.wide, dgate_BF, params.gate_proj, transpose=True)
    return dparams, _as_stream(op, dx_BD + _multiply(op, op.wide, dup_BF, params.up_proj, transpose=True))


def _hidden_gradients(op, params, x_BD, mask_BF, kept, dy_BD):
    """h and the gradients of gate and up, in the compute dtype."""
    if op.kernels == "gpu" and kept:
        dy_BD = dy_BD.astype(op.dtype)
        return backends.hidden_gradients(params, dy_BD, *kept, activation=op.activation, rules=op.axis_rules)
    stored = op.wide if op.exact else op.stored
    dh_BF = _over_hidden(op, _multiply(op, stored, dy_BD, params.down_proj, transpose=True))
    # A 1 that the compiler does not know and has only after dh: without it an unrolled stack shares what is computed
    # again here with its forward pass, and so keeps it in memory. (Barriers around x, gate and up have them copied.)
    # On a CPU, where time is what is short, it may share.
    one = jnp.ones((), op.dtype)
    if not op.on_cpu:
        one, dh_BF = lax.optimization_barrier((one, dh_BF))
    if kept:
        gate_BF, up_BF = (a * one for a in kept)
    else:
        x_again_BD = _gathered(op, x_BD.astype(op.dtype) * one)
        gate_BF = _project(op, stored, x_again_BD, params.gate_proj, params.gate_bias)
        up_BF = _project(op, stored, x_again_BD, params.up_proj, params.up_bias)
    gate_BF, up_BF, dh_BF = (a.astype(op.wide) for a in (gate_BF, up_BF, dh_BF))
    h_BF, pull_back = jax.vjp(lambda gate, up: _gated(op, gate, up, mask_BF), gate_BF, up_BF)
    # Without the barrier gate, up and dh all stay, for the operands of the products below to be computed inside them.
    return lax.optimization_barrier(tuple(a.astype(op.dtype) for a in (h_BF, *pull_back(dh_BF))))


def _apart(op, x_BD):
    """x, on a v5p behind a barrier: without it a loop over layers carries a [T, D] in VMEM and copies it out.

    On other TPUs it costs a [T, D] as often as it saves one; GPUs and meshes only lose by it.
    """
    if op.axis_rules is not None or target_device().device_kind not in V5P:
        return x_BD
    return lax.optimization_barrier(x_BD)


def _slice_size(op, x_BD, hidden_part):
    """As many slices of each device's part of F as the forward pass has chunks of tokens; more where `op.exact`.

    One around a TPU's kernel, whose results take the place of what is kept: slices of it would be copies.
    """
    unchunked = op.chunk_size is None or op.kernels == "tpu" or x_BD.ndim < 2
    chunks = 1 if unchunked else ceil_div(x_BD.shape[-2], op.chunk_size)
    return round_up(ceil_div(hidden_part, max(chunks, SLICES if op.exact else 1)), LANES)


class Cut(NamedTuple):
    """Takes slices of an axis that is split over `shards` devices: from each device's part the same, so none moves."""

    axis: int
    shards: int

    def take(self, array, start, size) -> Any:
        return None if array is None else self._join(lax.dynamic_slice_in_dim(self._split(array), start, size, self.at))

    def put(self, array, part, start) -> Any:
        if array is None:
            return None
        return self._join(lax.dynamic_update_slice_in_dim(self._split(array), self._split(part), start, self.at))

    @property
    def at(self):
        """The axis of each device's part, in :meth:`_split`."""
        return self.axis if self.axis < 0 else self.axis + 1

    def _split(self, array):
        axis = self.axis % array.ndim
        return array.reshape(*array.shape[:axis], self.shards, -1, *array.shape[axis + 1 :])

    def _join(self, array):
        axis = self.at % array.ndim
        return array.reshape(*array.shape[: axis - 1], -1, *array.shape[axis + 1 :])


def _as_stream(op, array_BD):
    return constrain(array_BD, None, op.axis_rules)


def _over_hidden(op, array_BF):
    return constrain(array_BF, "mlp", op.axis_rules)


def _gathered(op, array_BD):
    """The stream where every device needs the whole length of it."""
    rules = op.axis_rules and tuple((name, None if name == "length" else parts) for name, parts in op.axis_rules)
    return constrain(array_BD, None, rules)


def _project(op, result, x, weight, bias):
    """x @ weight + bias, in the dtype `result`."""
    if bias is None:
        return _multiply(op, result, x, weight)
    y = _multiply(op, op.wide, x, weight)
    return (y + jnp.broadcast_to(bias.astype(op.wide), y.shape)).astype(result)


def _multiply(op, result, a, weight, transpose=False):
    return multiply(a, weight, result=result, dtype=op.dtype, on_cpu=op.on_cpu, transpose=transpose)


def _outer(op, a, b, weight):
    """a.T @ b, summed over all leading axes: a weight's gradient, in the weight's dtype."""
    sharded = op.axis_rules is not None
    return outer(a, b, result=weight.dtype, dtype=op.dtype, on_cpu=op.on_cpu, sharded=sharded)


def _total(d, bias):
    """A bias's gradient: the sum over all leading axes, in the bias's dtype."""
    if bias is None:
        return None
    wide = accumulation_dtype(d.dtype)
    return jnp.sum(d.astype(wide), axis=tuple(range(d.ndim - 1))).astype(bias.dtype)
