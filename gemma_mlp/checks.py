"""Checks: errors that say how to mend them, and checks of values on request.

Static facts (config values, ranks, axis sizes, dtypes) are checked while JAX traces and cost nothing when the program
runs. Values (are all numbers finite?) are checked only inside :func:`check_values`.
"""

import difflib
import functools
import operator
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import chex
import jax
import jax.numpy as jnp

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# A user context is part of the key of JAX's caches: a function that was traced with the checks off is traced again once
# they are on, and the other way round.
_values_are_checked = jax.make_user_context(default_value=False)


def require(condition: bool, rule: str, received: str, fix: str) -> None:
    """Raises ValueError, with the rule, what came and the likely fix, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{rule} Got: {received}. Fix: {fix}")


def positive_int(name: str, value: Any) -> int:
    """`value` as an int. Raises ValueError unless it is a whole number of at least 1."""
    rule, fix = f"{name} must be a whole number of at least 1.", "give the size as a positive int."
    require(not isinstance(value, bool) and hasattr(value, "__index__"), rule, repr(value), fix)
    require(operator.index(value) >= 1, rule, repr(value), fix)
    return operator.index(value)


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError unless `value` is one of the names in `choices`."""
    known = isinstance(value, str) and value in choices
    require(known, f"{name} must be one of {', '.join(choices)}.", repr(value), likely_fix(value, choices))


def likely_fix(value: Any, choices: Any) -> str:
    """The fix of a wrong name: the one of `choices` that is spelled like it, if there is one."""
    close = difflib.get_close_matches(str(value), choices, 1)
    return f"use {close[0]!r}, or another of these names." if close else "use one of these names."


@contextmanager
def explained(rule: str, received: str, fix: str):
    """Turns the AssertionError of a chex assertion into a ValueError that says how to mend it."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"{rule} Got: {received}. Fix: {fix}") from error


def describe(array: Any) -> str:
    """`f32[2, 3]`-like text for error messages, and the type's name for what is not an array."""
    if hasattr(array, "shape") and hasattr(array, "dtype"):
        return f"{array.dtype}[{', '.join(map(str, array.shape))}]"
    return type(array).__name__


def check_values(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` under jit with every value assertion of this package switched on.

    Wrap a call of a module, a function or a whole training step, jitted already or not::

        y = check_values(mlp)(x)
        step = check_values(train_step)

    Each norm and each feed-forward inside asserts that its parameters and its input are finite. A feed-forward also
    asserts that its output is finite. All of them assert that their gradients are, if they are differentiated; this
    works under scan, remat and vmap too. Reverse mode only: JAX cannot differentiate an assertion forwards. (When
    Python exits, chex warns of statuses that were not inspected; here all were.)

    Args:
      function: a pure function of pytrees of arrays, an NNX module, or a function of NNX modules and optimizers. It may
        update these, as under `nnx.jit`. What it returns must be arrays.

    Returns:
      A function that computes the same, waits for the result, and raises AssertionError with the name of the array that
      is not finite, if there is one. Modules are then as they were before the call.
    """
    from flax import nnx

    def is_stateful(leaf):
        return isinstance(leaf, (nnx.Pytree, nnx.Variable))

    @functools.partial(jax.jit, static_argnums=0)
    def run(tree, stateful, arrays):
        stateful = nnx.merge(*stateful)
        leaves = [array if node is None else node for node, array in zip(stateful, arrays)]
        called, args, kwargs = jax.tree.unflatten(tree, leaves)
        call: Any = function if called is None else called
        result = call(*args, **kwargs)
        require(
            not any(map(is_stateful, jax.tree.leaves(result, is_leaf=is_stateful))),
            "What check_values wraps must return arrays.",
            "an NNX module, variable or optimizer among the results",
            "return nothing for those that were passed in: they are updated in place.",
        )
        return result, nnx.state(stateful)

    checked = chex.chexify(run, async_check=False)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        called = function if is_stateful(function) else None
        leaves, tree = jax.tree.flatten((called, args, kwargs), is_leaf=is_stateful)
        stateful = [leaf if is_stateful(leaf) else None for leaf in leaves]
        arrays = [None if is_stateful(leaf) else leaf for leaf in leaves]
        with _values_are_checked(True):
            result, state = checked(tree, nnx.split(stateful), arrays)
        nnx.update(stateful, state)
        return result

    return wrapper


def ensure_finite(name: str, tree: T) -> T:
    """Returns `tree`. Inside :func:`check_values` it also asserts that its floats and their gradients are finite."""
    if not _values_are_checked.value:
        return tree
    # Each array alone, so that a gradient is asked for only where there was one before.
    return jax.tree.map(lambda a: _ensure_finite(name, a) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


# The backward pass asserts once more, inside a jit whose result is used: JAX drops the forward pass's assertion when it
# differentiates a scan (seen on 0.10.2 and 0.12).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ensure_finite(name, tree):
    chex.assert_tree_all_finite({name: tree})
    return tree


def _ensure_finite_forward(name, tree):
    return _ensure_finite(name, tree), tree


def _ensure_finite_backward(name, tree, cotangent):
    @jax.jit
    def assert_both(tree, cotangent):
        chex.assert_tree_all_finite({name: tree, f"gradient of {name}": cotangent})
        return cotangent

    return (assert_both(tree, cotangent),)


_ensure_finite.defvjp(_ensure_finite_forward, _ensure_finite_backward)
