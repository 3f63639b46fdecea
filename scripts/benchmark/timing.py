"""Times the forward pass, and value and gradient, against the bare matmuls of the same sizes.

The contestants take turns in one run, and each time is the median of all rounds. What counts is the ratio to the
contestant `matmuls`. It runs nothing but the matmuls: three for the forward pass, nine for value and gradient. On a CPU
each is written in the fastest form that accumulates in float32. On an accelerator they are one program. If PyTorch and
transformers are installed, Hugging Face's module takes part on a CPU as `torch`. A wrong result is not timed.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import gemma_mlp
from benchmark import checking
from gemma_mlp.testing.stacks import plain

# Columns of the table and lines of the figure, if they take part. `ours` has the default options.
CONTESTANTS = ("ours", "input", "gate_up", "plain", "pallas", "pallas_gate_up", "tokamax", "torch")
# The axes over which the two operands of a matmul are contracted.
NO_TRANSPOSE, TRANSPOSE_WEIGHT, OVER_TOKENS = (1, 0), (1, 1), (0, 0)


def measure(config: gemma_mlp.MLPConfig, dtype: str, tokens: int, rounds: int):
    """Yields one row for the forward pass and one for value and gradient: milliseconds by contestant.

    A row also has `errors`, relative to the plain formula in float32, and `left_out`, the reason why a contestant was
    not timed. PyTorch's module and the bare matmuls are not compared.
    """
    param_key, *keys = jax.random.split(jax.random.key(0), 3)
    config = dataclasses.replace(config, param_dtype=dtype)
    params = jax.jit(functools.partial(gemma_mlp.MLPParams.init, config))(param_key)
    x, dy = (jax.random.normal(key, (tokens, config.embed_dim), dtype) for key in keys)
    forward, gradient = bare_matmuls(params, x)
    peer = hugging_face(params, x, dy) or (None, None)

    # The forward pass is the same for both save policies, so there is one contestant, `ours`.
    layers = layers_of(config, dtype)
    names = {"input": "ours", "plain": "plain", "pallas": "pallas", "tokamax": "tokamax"}
    contestants = {new: jitted(layers[name], params, x) for name, new in names.items() if name in layers}
    expected = checking.plain_float32(params, x)
    yield {"pass": "forward", **compare(forward, contestants, peer[0], expected, rounds)}

    contestants = {name: jitted(value_and_gradient(layer), params, x, dy) for name, layer in layers.items()}
    expected = float32(value_and_gradient(checking.plain_float32))(params, x, dy)
    yield {"pass": "gradient", **compare(gradient, contestants, peer[1], expected, rounds)}


def layers_of(config, dtype) -> dict[str, Callable]:
    ours = gemma_mlp.feed_forward
    layers = {
        "input": functools.partial(ours, save="input"),
        "gate_up": functools.partial(ours, save="gate_up"),
        "plain": plain,
    }
    if kernels_refuse(config, dtype) is None:
        layers["pallas"] = functools.partial(ours, implementation="pallas")
        layers["pallas_gate_up"] = functools.partial(ours, implementation="pallas", save="gate_up")
    if (by_tokamax := tokamax_layer()) is not None:
        layers["tokamax"] = by_tokamax
    return layers


def tokamax_layer() -> Callable | None:
    """The plain formula with tokamax's kernel for h, in the form that it chooses. None if not installed or off a GPU.

    It looks for the GPU among this process's devices, so the compiler for an absent one gets no kernel.
    """
    if jax.default_backend() != "gpu":
        return None
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None

    def layer(params, x):
        weights = params.gate_proj, params.up_proj
        return tokamax.gated_linear_unit(x, weights, activation=jax.nn.gelu) @ params.down_proj

    return layer


def compare(matmuls, contestants, torch, expected, rounds):
    """The part of a row that has the times, the errors, and who is left out."""
    right, errors, left_out = checking.check(contestants, lambda _: expected)
    racing = {"matmuls": matmuls, **right} | ({"torch": torch} if torch else {})
    return {**race(racing, rounds), "errors": errors, "left_out": left_out}


def float32(function):
    """`function` with its bfloat16 arguments in float32."""
    return jax.jit(lambda *args: function(*checking.wide(args)))


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
    keys = jax.random.split(jax.random.key(0), 3)  # random numbers, because some chips are faster on constants
    a, b = (jax.random.normal(key, (side, side), dtype) for key in keys[:2])
    long = jnp.tile(jax.random.normal(keys[2], (2**16,), dtype), length // 2**16)
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
    gate, up, down = params.gate_proj, params.up_proj, params.down_proj
    h, h2 = (jax.random.normal(key, (len(x), gate.shape[1]), x.dtype) for key in jax.random.split(jax.random.key(0)))
    forward = [(x, gate, NO_TRANSPOSE), (x, up, NO_TRANSPOSE), (h, down, NO_TRANSPOSE)]
    backward = [
        (x, down, TRANSPOSE_WEIGHT),  # dh
        *((h, gate, TRANSPOSE_WEIGHT), (h2, up, TRANSPOSE_WEIGHT)),  # dx
        *((x, h, OVER_TOKENS), (x, h2, OVER_TOKENS)),  # gradients of gate_proj and up_proj
        (h, x, OVER_TOKENS),  # gradient of down_proj
    ]
    together = in_turn if jax.default_backend() == "cpu" else one_program
    return together(forward), together(forward + backward)


def one_program(matmuls) -> Callable:
    """A program of all matmuls, for which the compiler of an accelerator chooses the forms."""
    operands, axes = [(a, b) for a, b, _ in matmuls], [axes for *_, axes in matmuls]
    return jitted(lambda operands: [dot(a, b, one, a.dtype) for (a, b), one in zip(operands, axes)], operands)


def in_turn(matmuls) -> Callable:
    """A function that runs matmuls in their fastest forms, and waits for each, as a CPU would run several at once."""
    forms, calls = {}, []
    for a, b, axes in matmuls:
        kind = a.shape, b.shape, axes
        if kind not in forms:
            forms[kind] = fastest(a, b, axes)
        calls.append(functools.partial(forms[kind], a, b))
    return lambda: [jax.block_until_ready(call()) for call in calls]


def fastest(a, b, axes) -> Callable:
    """The fastest form of one matmul, compiled."""
    forms = [jax.jit(form) for form in forms_of(a, b, axes)]
    times = [race({"form": functools.partial(form, a, b)}, 3)["form"] for form in forms]
    return forms[times.index(min(times))]


def forms_of(a, b, axes):
    """Yields functions of (a, b) that compute the same matmul in float32; a CPU may accumulate in a narrower result."""
    yield lambda a, b: dot(a, b, axes, jnp.float32)
    yield lambda a, b: dot(b, a, axes[::-1], jnp.float32).T
    if a.shape[0] == 1 and axes != OVER_TOKENS:
        yield lambda a, b: dot(jnp.pad(a, ((0, 1), (0, 0))), b, axes, jnp.float32)[:1]


def dot(a, b, axes, dtype):
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=dtype)


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
