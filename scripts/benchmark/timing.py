"""Time of the forward pass and of value and gradient, beside the bare products of the same sizes, in one run.

The contestants take turns, each figure is the median of all rounds, and what counts is a row's ratio to `products`: the
three products of the forward pass, the nine of value and gradient, each in the fastest of its forms that accumulate
in float32, with nothing between them. On a machine with PyTorch and transformers, Hugging Face's module takes part.
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import gemma_mlp
from gemma_mlp.testing.stacks import plain

NO_TRANSPOSE, TRANSPOSE_WEIGHT, OVER_TOKENS = (1, 0), (1, 1), (0, 0)  # the contracted axis of each operand


def measure(config: gemma_mlp.MLPConfig, dtype: str, tokens: int, rounds: int):
    """Yields a row for the forward pass and one for value and gradient: milliseconds by contestant."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (tokens, config.embed_dim)
    params = jax.jit(lambda key: jax.tree.map(lambda a: a.astype(dtype), gemma_mlp.MLPParams.init(config, key)))(
        keys[0]
    )
    x, dy = (jax.random.normal(key, shape, dtype) for key in keys[1:])
    layers = {
        "input": functools.partial(gemma_mlp.feed_forward, save="input"),
        "gate_up": functools.partial(gemma_mlp.feed_forward, save="gate_up"),
        "plain": plain,
    }
    if kernels_refuse(config, dtype) is None:
        layers["pallas"] = functools.partial(gemma_mlp.feed_forward, implementation="pallas")
    torch_forward, torch_gradient = hugging_face(params, x, dy) or (None, None)
    forward, gradient = products(params, x)

    contestants = {"products": forward, "ours": jitted(layers["input"], params, x), "plain": jitted(plain, params, x)}
    contestants |= {name: jitted(layer, params, x) for name, layer in layers.items() if name == "pallas"}
    yield {"pass": "forward", **race(contestants | named("torch", torch_forward), rounds)}

    contestants = {"products": gradient}
    contestants |= {name: jitted(value_and_gradient(layer), params, x, dy) for name, layer in layers.items()}
    yield {"pass": "gradient", **race(contestants | named("torch", torch_gradient), rounds)}


def kernels_refuse(config: gemma_mlp.MLPConfig, dtype: str) -> str | None:
    """Why `implementation="pallas"` does not serve a case on this device; None where it does."""
    shapes = jax.eval_shape(lambda: gemma_mlp.MLPParams.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    x = jax.ShapeDtypeStruct((1, config.embed_dim), dtype)  # any number of tokens is served, or none
    try:
        jax.eval_shape(functools.partial(gemma_mlp.feed_forward, implementation="pallas"), params, x)
    except ValueError as error:
        return str(error)


def work(config: gemma_mlp.MLPConfig, dtype: str, tokens: int, which: str) -> tuple[int, int]:
    """FLOPs of the products, and the bytes that have to be moved: weights, input, output, and their gradients."""
    weights = 3 * config.embed_dim * config.hidden_dim
    stream = tokens * config.embed_dim
    flops, numbers = 2 * tokens * weights, weights + 2 * stream
    factor = (1, 1) if which == "forward" else (3, 2)
    return factor[0] * flops, factor[1] * numbers * jnp.dtype(dtype).itemsize


def ceiling(dtype: str, rounds: int) -> dict[str, float]:
    """What this device reaches at its best: TFLOP/s of a square product, GB/s of reading a large array."""
    on_cpu = jax.default_backend() == "cpu"
    side, length = (2048, 2**26) if on_cpu else (8192, 2**30)
    a, b = jnp.ones((2, side, side), dtype)
    long = jnp.ones(length, dtype)
    product = jitted(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32), a, b)
    times = race({"product": product, "read": jitted(jnp.max, long)}, rounds)
    return {
        "TFLOP/s": 2 * side**3 / times["product"] / 1e9,
        "GB/s": long.nbytes / times["read"] / 1e6,
    }


def value_and_gradient(layer):
    def compute(params, x, dy):
        y, pull_back = jax.vjp(layer, params, x)
        return y, pull_back(dy)

    return compute


def products(params, x) -> tuple[Callable, Callable]:
    """The three products of the forward pass, and the nine of value and gradient, on arrays of the right shapes."""
    h = jnp.ones((x.shape[0], params.gate_proj.shape[1]), x.dtype)
    up, down = (x, params.gate_proj), (h, params.down_proj)
    forward = [fastest(*up, NO_TRANSPOSE)] * 2 + [fastest(*down, NO_TRANSPOSE)]
    backward = (
        [fastest(x, params.down_proj, TRANSPOSE_WEIGHT)]  # dh
        + [fastest(h, params.gate_proj, TRANSPOSE_WEIGHT)] * 2  # dx
        + [fastest(x, h, OVER_TOKENS)] * 2  # of the gate's and up's weights
        + [fastest(h, x, OVER_TOKENS)]  # of the down projection's
    )
    return in_turn(forward), in_turn(forward + backward)


def fastest(a, b, axes) -> Callable:
    """The fastest form of one product."""
    forms = [jitted(form, a, b) for form in forms_of(a, b, axes)]
    times = [race({"form": form}, 3)["form"] for form in forms]
    return forms[times.index(min(times))]


def forms_of(a, b, axes):
    def dot(a, b, axes, dtype):
        dimensions = (((axes[0],), (axes[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)

    # On a CPU a product whose result is bfloat16 need not have been accumulated in float32.
    for dtype in {jnp.float32, a.dtype if jax.default_backend() != "cpu" else jnp.float32}:
        yield lambda a, b, dtype=dtype: dot(a, b, axes, dtype)
        yield lambda a, b, dtype=dtype: dot(b, a, axes[::-1], dtype).T
    if a.shape[0] == 1 and axes != OVER_TOKENS:
        yield lambda a, b: dot(jnp.pad(a, ((0, 1), (0, 0))), b, axes, jnp.float32)[:1]


def in_turn(calls) -> Callable:
    """Runs products one after the other; a CPU would otherwise run them at the same time."""
    wait = jax.block_until_ready if jax.default_backend() == "cpu" else lambda result: result
    return lambda: [wait(call()) for call in calls]


def jitted(function, *args) -> Callable:
    return functools.partial(jax.jit(function), *args)


def named(name, contestant):
    return {} if contestant is None else {name: contestant}


def race(contestants: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds of a call, with as many calls in flight as take about 20 ms."""
    repeats = {}
    for name, call in contestants.items():
        jax.block_until_ready(call())  # compiles
        repeats[name] = 1 if jax.default_backend() == "cpu" else max(1, int(0.02 / clock(call, 1)))
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            jax.block_until_ready(call())  # so that it finds in the caches what it leaves there, not what others do
            times[name].append(clock(call, repeats[name]))
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}


def clock(call, repeats) -> float:
    """Seconds of a call, results waited for."""
    start = time.perf_counter()
    result = call()
    for _ in range(repeats - 1):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def hugging_face(params, x, dy) -> tuple[Callable, Callable] | None:
    """Gemma2MLP on PyTorch with the same weights and input, forward and value and gradient; None if not installed."""
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
