"""Compares each result with the plain formula in float32, so that a wrong result is reported and not timed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemma_mlp import dequantize, merge_lora
from gemma_mlp.testing.stacks import plain

BOUND = 0.02  # of a relative L2 error; bfloat16 has 0.002 to 0.006, and a wrong result far more


def wide(tree):
    """`tree` with its bfloat16 arrays in float32."""
    return jax.tree.map(lambda a: a.astype("float32") if a.dtype == jnp.bfloat16 else a, tree)


@jax.jit
def plain_float32(params, x):
    """The plain formula in float32, on dequantised weights into which adapters are merged."""
    params, x = wide((params, x))
    with jax.default_matmul_precision("highest"):
        return plain(merge_lora(dequantize(params)), x)


@jax.jit
def relative_error(result, expected):
    """The largest relative L2 error of a tree's arrays. Norms of rows come first, as long float32 sums lose digits."""

    def norm(a):
        return jnp.linalg.norm(jnp.linalg.norm(a.reshape(-1, a.shape[-1]), axis=-1))

    pairs = zip(jax.tree.leaves(wide(result)), jax.tree.leaves(wide(expected)), strict=True)
    return jnp.max(jnp.stack([norm(a - b) / norm(b) for a, b in pairs]))


def check(contestants: dict[str, Callable], expected: Callable[[Any], Any]):
    """Calls each contestant once, and compares its result with what `expected` gives for this result.

    Returns:
      the contestants that are right, {name: relative error} of these, and {name: reason} of those that are left out,
      because the error is above BOUND, or because they raise: they may not compile, or not fit into the memory.
    """
    right, errors, left_out = {}, {}, {}
    for name, call in contestants.items():
        try:
            result = jax.block_until_ready(call())
            errors[name] = float(relative_error(result, expected(result)))
        except Exception as error:
            left_out[name] = explain(error)
            continue
        if errors[name] <= BOUND:  # False for NaN
            right[name] = call
        else:
            left_out[name] = f"WRONG: its relative error is {errors.pop(name):.2g}, and must be at most {BOUND}"
    return right, errors, left_out


def explain(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
