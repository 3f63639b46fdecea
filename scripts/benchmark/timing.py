"""Times the forward pass, and value and gradient, against the bare matmuls of the same sizes.

The contestants take turns in one run, and each time is the median of all rounds. What counts is the ratio to the
contestant `matmuls`. It runs nothing but the matmuls: three for the forward pass, nine for value and gradient. Each is
written in the fastest form that accumulates in float32. If PyTorch and transformers are installed, Hugging Face's
module takes part as `torch`.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import gemma_mlp
from gemma_mlp.testing.stacks import plain

# The axes over which the two operands of a matmul are contracted.
NO_TRANSPOSE, TRANSPOSE_WEIGHT, OVER_TOKENS = (1, 0), (1, 1), (0, 0)


def measure(config: gemma_mlp.MLPConfig, dtype: str, tokens: int, rounds: int):
    """Yields one row for the forward pass and one for value and gradient: milliseconds by contestant."""
    param_key, *keys = jax.random.split(jax.random.key(0), 3)
    config = dataclasses.replace(config, param_dtype=dtype)
    params = jax.jit(functools.partial(gemma_mlp.MLPParams.init, config))(param_key)
    x, dy = (jax.random.normal(key, (tokens, config.embed_dim), dtype) for key in keys)
    layers = {
        "input": functools.partial(gemma_mlp.feed_forward, save="input"),
        "gate_up": functools.partial(gemma_mlp.feed_forward, save="gate_up"),
        "plain": plain,
    }
    if kernels_refuse(config, dtype) is None:
        layers["pallas"] = functools.partial(gemma_mlp.feed_forward, implementation="pallas")
    forward, gradient = bare_matmuls(params, x)
    peer = hugging_face(params, x, dy)

    # The forward pass is the same for both save policies, so there is one contestant, `ours`.
    contestants = {"matmuls": forward, "ours": jitted(layers["input"], params, x), "plain": jitted(plain, params, x)}
    if "pallas" in layers:
        contestants["pallas"] = jitted(layers["pallas"], params, x)
    if peer:
        contestants["torch"] = peer[0]
    yield {"pass": "forward", **race(contestants, rounds)}

    contestants = {"matmuls": gradient}
    contestants |= {name: jitted(value_and_gradient(layer), params, x, dy) for name, layer in layers.items()}
    if peer:
        contestants["torch"] = peer[1]
    yield {"pass": "gradient", **race(contestants, rounds)}


def kernels_refuse(config: gemma_mlp.MLPConfig, dtype: str) -> str | None:
    """Why the kernels refuse this config on this device, or None if they accept it."""
    config = dataclasses.replace(config, param_dtype=dtype)
    params = jax.eval_shape(lambda: gemma_mlp.MLPParams.init(config, jax.random.key(0)))
    x = jax.ShapeDtypeStruct((1, config.embed_dim), dtype)  # the answer does not depend on the number of tokens
    try:
        jax.eval_shape(functools.partial(gemma_mlp.feed_forward, implementation="pallas"), params, x)
    except ValueError as error:
        return str(error)


def work(config: gemma_mlp.MLPConfig, dtype: str, tokens: int, which: str) -> tuple[int, int]:
    """Returns (FLOPs of the matmuls, bytes that must be moved). `which` is "forward" or "gradient".

    The bytes are those of the weights, the input, the output, and their gradients.
    """
    weights = 3 * config.embed_dim * config.hidden_dim
    flops, numbers = 2 * tokens * weights, weights + 2 * tokens * config.embed_dim
    flops_factor, bytes_factor = (1, 1) if which == "forward" else (3, 2)
    return flops_factor * flops, bytes_factor * numbers * jnp.dtype(dtype).itemsize


def ceiling(dtype: str, rounds: int) -> dict[str, float]:
    """The best that this device reaches: TFLOP/s of a large square matmul, GB/s of reading a large array."""
    on_cpu = jax.default_backend() == "cpu"
    side, length = (2048, 2**26) if on_cpu else (8192, 2**30)
    a, b = jnp.ones((2, side, side), dtype)
    long = jnp.ones(length, dtype)
    matmul = jitted(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32), a, b)
    times = race({"matmul": matmul, "read": jitted(jnp.max, long)}, rounds)
    return {
        "TFLOP/s": 2 * side**3 / times["matmul"] / 1e9,
        "GB/s": long.nbytes / times["read"] / 1e6,
    }


def value_and_gradient(layer):
    def compute(params, x, dy):
        y, pull_back = jax.vjp(layer, params, x)
        return y, pull_back(dy)

    return compute


def bare_matmuls(params, x) -> tuple[Callable, Callable]:
    """The three matmuls of the forward pass, and the nine of value and gradient, on arrays of the right shapes."""
    h = jnp.ones((x.shape[0], params.gate_proj.shape[1]), x.dtype)
    up, down = (x, params.gate_proj), (h, params.down_proj)
    forward = [fastest(*up, NO_TRANSPOSE)] * 2 + [fastest(*down, NO_TRANSPOSE)]
    backward = (
        [fastest(x, params.down_proj, TRANSPOSE_WEIGHT)]  # dh
        + [fastest(h, params.gate_proj, TRANSPOSE_WEIGHT)] * 2  # dx
        + [fastest(x, h, OVER_TOKENS)] * 2  # gradients of gate_proj and up_proj
        + [fastest(h, x, OVER_TOKENS)]  # gradient of down_proj
    )
    return in_turn(forward), in_turn(forward + backward)


def fastest(a, b, axes) -> Callable:
    """The fastest form of one matmul, as a function of no arguments."""
    forms = [jitted(form, a, b) for form in forms_of(a, b, axes)]
    times = [race({"form": form}, 3)["form"] for form in forms]
    return forms[times.index(min(times))]


def forms_of(a, b, axes):
    """Yields functions of (a, b) that compute the same matmul and accumulate in float32."""

    def dot(a, b, axes, dtype):
        dimensions = (((axes[0],), (axes[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)

    # A CPU may accumulate in bfloat16 if the result is bfloat16, so there only float32 results count.
    for dtype in {jnp.float32, a.dtype if jax.default_backend() != "cpu" else jnp.float32}:
        yield lambda a, b, dtype=dtype: dot(a, b, axes, dtype)
        yield lambda a, b, dtype=dtype: dot(b, a, axes[::-1], dtype).T
    if a.shape[0] == 1 and axes != OVER_TOKENS:
        yield lambda a, b: dot(jnp.pad(a, ((0, 1), (0, 0))), b, axes, jnp.float32)[:1]


def in_turn(calls) -> Callable:
    """A function that runs matmuls one after the other. Without waiting, a CPU would run them at the same time."""
    wait = jax.block_until_ready if jax.default_backend() == "cpu" else lambda result: result
    return lambda: [wait(call()) for call in calls]


def jitted(function, *args) -> Callable:
    """A function of no arguments that runs the compiled `function` on `args`."""
    return functools.partial(jax.jit(function), *args)


def race(contestants: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median milliseconds of a call of each contestant.

    On an accelerator each measurement makes enough calls to take about 20 ms, and waits for the last one.
    """
    repeats = {}
    for name, call in contestants.items():
        jax.block_until_ready(call())  # compiles
        repeats[name] = 1 if jax.default_backend() == "cpu" else max(1, int(0.02 / clock(call, 1)))
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            jax.block_until_ready(call())  # the caches then hold this contestant's data, not that of the one before
            times[name].append(clock(call, repeats[name]))
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}


def clock(call, repeats) -> float:
    """Seconds of one call, averaged over `repeats` calls, including the wait for the results."""
    start = time.perf_counter()
    result = call()
    for _ in range(repeats - 1):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def hugging_face(params, x, dy) -> tuple[Callable, Callable] | None:
    """Gemma2MLP on PyTorch, with the same weights and input: (forward, value and gradient). None if not installed."""
    if jax.default_backend() != "cpu":
        return None  # JAX and PyTorch would share the device's memory
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import Gemma2Config  # pyright: ignore[reportMissingImports]
        from transformers.models.gemma2 import modeling_gemma2  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    embed_dim, hidden_dim = params.gate_proj.shape
    dtype = getattr(torch, x.dtype.name)

    def tensor(array):
        return torch.from_dlpack(array.astype("float32")).to(dtype).clone()

    module = modeling_gemma2.Gemma2MLP(Gemma2Config(hidden_size=embed_dim, intermediate_size=hidden_dim)).to(dtype)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(module, name).weight.copy_(tensor(getattr(params, name)).T)
    torch_x, torch_dy = tensor(x), tensor(dy)

    def forward():
        with torch.no_grad():
            module(torch_x)

    def gradient():
        module.zero_grad()
        module(torch_x.detach().requires_grad_()).backward(torch_dy)

    return forward, gradient
