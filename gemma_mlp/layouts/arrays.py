"""Operations on the arrays of a tree, which may be NumPy's, JAX's, or only shapes (`jax.ShapeDtypeStruct`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_mlp.checks import require


def evaluate(function: Callable, *arrays: Any) -> Any:
    """`function(*arrays)`. If `arrays` are only shapes, the shape of what it would return."""
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
        return jax.eval_shape(function, *arrays)
    return function(*arrays)


def stack(*arrays: Any) -> Any:
    """The arrays on a new first axis: a NumPy array if all are NumPy's, else a JAX array."""
    library = np if all(isinstance(array, np.ndarray) for array in arrays) else jnp
    return evaluate(lambda *arrays: library.stack(arrays), *arrays)


def transpose(array: Any, axes: str, to: str) -> Any:
    """`array`, whose axes are the letters `axes`, with its axes in the order `to`."""
    order = tuple(axes.index(axis) for axis in to)
    return array if axes == to else evaluate(lambda array: array.transpose(order), array)


def add_exactly(array: Any, number: int, name: str, rounding: bool) -> Any:
    """`array + number` in float32, or in float64 if the array is: add -1 to read w, +1 to store 1 + w.

    A ValueError names the stored tensor if the sum had to be rounded, unless `rounding` allows it.
    """
    wide = np.promote_types(array.dtype, np.float32)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, wide)
    array = array.astype(wide)
    shifted = array + array.dtype.type(number)
    lost = 0 if rounding else int((shifted - array.dtype.type(number) != array).sum())
    require(
        lost == 0,
        f"{name} stores 1 + w, and w must come back from it exactly.",
        f"{lost} of {array.size} numbers that {wide} rounds",
        f"round_norms=True allows rounding to {wide}, in which the block computes 1 + w too.",
    )
    return shifted
