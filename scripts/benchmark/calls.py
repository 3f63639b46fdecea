"""Times what a call costs before any arithmetic: a small block, against the plain formula and Flax's own layers.

Each row is the median over rounds of ours divided by theirs. The two take turns, in one process.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import gemma_mlp
from gemma_mlp import MLPBlockParams, MLPConfig, mlp_block

CONFIG = MLPConfig(64, 256, dtype="bfloat16", param_dtype="bfloat16")
DTYPES = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
CALLS = 10  # for each time of an eager call


def measure(layers: int, rounds: int):
    """Yields rows: what is measured, milliseconds of ours and of theirs, and the median of their ratios."""
    x = jax.random.normal(jax.random.key(1), (2, 16, CONFIG.embed_dim), "bfloat16")
    params = MLPBlockParams.init(CONFIG, jax.random.key(0))
    yield compare("eager mlp_block", rounds, lambda: mlp_block(params, x, CONFIG), lambda: plain(params, x))
    grad_ours, grad_plain = (jax.grad(loss(layer)) for layer in (ours, plain))
    yield compare("eager grad of mlp_block", rounds, lambda: grad_ours(params, x), lambda: grad_plain(params, x))

    modules = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0)), FlaxBlock(nnx.Rngs(0))
    yield compare("eager NNX module", rounds, *(lambda module=module: module(x) for module in modules))
    grad = nnx.grad(loss(lambda module, x: module(x)))
    yield compare("eager nnx.grad", rounds, *(lambda module=module: grad(module, x) for module in modules))

    linen = [(module, module.init(jax.random.key(0), x)) for module in (gemma_mlp.linen.MLPBlock(CONFIG), LinenBlock())]
    yield compare("eager Linen module", rounds, *(lambda m=m, v=v: m.apply(v, x) for m, v in linen))
    grads = [(jax.grad(loss(module.apply)), variables) for module, variables in linen]
    yield compare("eager grad of Linen module", rounds, *(lambda g=g, v=v: g(v, x) for g, v in grads))

    stacks = [jax.jit(jax.grad(loss(unrolled(layer)))) for layer in (ours, plain)]
    yield from compare_compilation(f"{layers} unrolled layers", rounds, stacks, [params] * layers, x)


def ours(params, x):
    return mlp_block(params, x, CONFIG)


def plain(params, x):
    """The block as a model's code writes it: float32 norms around bfloat16 matmuls."""
    normed = plain_norm(params.pre_norm.scale, x)
    hidden = jax.nn.gelu(normed @ params.mlp.gate_proj) * (normed @ params.mlp.up_proj)
    return x + plain_norm(params.post_norm.scale, hidden @ params.mlp.down_proj)


def plain_norm(scale, x):
    wide = x.astype("float32")
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (normed * (1 + scale.astype("float32"))).astype(x.dtype)


class FlaxBlock(nnx.Module):
    def __init__(self, rngs):
        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs, **DTYPES)

        self.gate_proj = linear(CONFIG.embed_dim, CONFIG.hidden_dim)
        self.up_proj = linear(CONFIG.embed_dim, CONFIG.hidden_dim)
        self.down_proj = linear(CONFIG.hidden_dim, CONFIG.embed_dim)
        self.pre_norm, self.post_norm = (nnx.RMSNorm(CONFIG.embed_dim, rngs=rngs, **DTYPES) for _ in range(2))

    def __call__(self, x):
        normed = self.pre_norm(x)
        return x + self.post_norm(self.down_proj(nnx.gelu(self.gate_proj(normed)) * self.up_proj(normed)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        normed = nn.RMSNorm(**DTYPES)(x)
        gate, up = (nn.Dense(CONFIG.hidden_dim, use_bias=False, **DTYPES)(normed) for _ in range(2))
        return x + nn.RMSNorm(**DTYPES)(nn.Dense(CONFIG.embed_dim, use_bias=False, **DTYPES)(nn.gelu(gate) * up))


def loss(layer):
    return lambda params, x: jnp.sum(layer(params, x).astype("float32"))


def unrolled(layer):
    def stack(layers, x):
        for params in layers:
            x = layer(params, x)
        return x

    return stack


def compare(what, rounds, ours, theirs):
    for call in (ours, theirs):
        jax.block_until_ready(call())  # compiles
    return row(what, [(seconds(ours), seconds(theirs)) for _ in range(rounds)])


def compare_compilation(what, rounds, stacks, *args):
    times = []
    for _ in range(rounds):
        jax.clear_caches()
        times.append([lower_and_compile(stack, args) for stack in stacks])
    lowering, compiling = ([[stack[i] for stack in turn] for turn in times] for i in range(2))
    yield row(f"lowering {what}", lowering)
    yield row(f"compiling {what}", compiling)


def lower_and_compile(stack, args):
    """The seconds of both steps."""
    start = time.perf_counter()
    lowered = stack.lower(*args)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def seconds(call):
    start = time.perf_counter()
    for _ in range(CALLS):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / CALLS


def row(what, pairs):
    ours, theirs = (1000 * statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(one / other for one, other in pairs)
    return {"what": what, "ours": ours, "theirs": theirs, "ratio": ratio}
