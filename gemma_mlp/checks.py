"""Static checks with errors that help, and value checks on request.

Static facts (config values, ranks, axis sizes, dtypes) are checked while JAX traces and cost nothing when
the program runs. Values (are all numbers finite?) are checked only inside :func:`check_values`.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import chex
import jax

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# A user context is part of the key of JAX's caches: a function that was traced with the
# checks off is traced again once they are on, and the other way round.
_values_are_checked = jax.make_user_context(default_value=False)


def require(condition: bool, rule: str, received: str, fix: str) -> None:
    """Raises ValueError, with the rule, what was received and the likely fix, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{rule} Received: {received}. Fix: {fix}")


def require_new(path: Path) -> None:
    """Raises ValueError if there is something at `path`."""
    require(not path.exists(), "A checkpoint is written to a new folder.", f"{path}, which exists", "choose another.")


@contextmanager
def explained(rule: str, received: str, fix: str):
    """Turns the AssertionError of a chex assertion into a ValueError that says how to mend it."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"{rule} Received: {received}. Fix: {fix}") from error


def describe(array: Any) -> str:
    """`f32[2, 3]`-like text for error messages, and the type's name for what is not an array."""
    if hasattr(array, "shape") and hasattr(array, "dtype"):
        return f"{array.dtype}[{', '.join(map(str, array.shape))}]"
    return type(array).__name__


def check_values(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` under jit with every value assertion of this package switched on.

    The one switch: wrap a call of a module, a function or a whole training step, jitted already or not::

        y = check_values(mlp)(x)
        step = check_values(train_step)

    Each norm and each feed-forward inside asserts that its parameters and its input are finite, a feed-forward
    that its output is, and all of them, where they are differentiated, that their gradients are; under scan,
    remat and vmap too. Reverse mode only: an assertion cannot be differentiated forwards. (When Python exits,
    chex warns of statuses that were not inspected; here all were.)

    Args:
      function: a pure function of pytrees of arrays.

    Returns:
      A function that computes the same, waits for the result, and raises AssertionError with the name of
      the offending array if an assertion failed.
    """
    checked = chex.chexify(jax.jit(lambda *args, **kwargs: function(*args, **kwargs)), async_check=False)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with _values_are_checked(True):
            return checked(*args, **kwargs)

    return wrapper


def ensure_finite(name: str, tree: T) -> T:
    """Returns `tree`; traced inside :func:`check_values`, asserts that it and its cotangent are finite."""
    return _ensure_finite(name, tree) if _values_are_checked.value else tree


# The backward pass asserts once more, inside a jit whose result is used: an assertion of the
# forward pass alone is dropped when JAX differentiates a scan (seen on 0.10.2 and 0.12).
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
