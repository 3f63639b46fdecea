"""All numbers of a checkpoint must be finite: the readers check what they read, the writers what they write."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_mlp.checks import require
from gemma_mlp.layouts.trees import block_leaves
from gemma_mlp.params import MLPBlockParams


@jax.jit
def _all_finite(array):
    return jnp.isfinite(array).all()


def count_not_finite(array: Any) -> int:
    """The number of infinities and NaNs in an array."""
    # On a CPU, sum() takes four bytes for each number, all() only one. So sum only if some are not finite.
    return 0 if _all_finite(array) else int((~jnp.isfinite(array)).sum())


def require_finite(name: str, not_finite: int, size: int) -> None:
    """Raises ValueError unless `not_finite`, the count of such numbers in the array called `name`, is 0."""
    rule, received = f"{name} must be finite.", f"{not_finite} numbers that are not, of {size}"
    require(not_finite == 0, rule, received, "find a sound copy.")


def require_finite_layers(layers: Mapping[int, MLPBlockParams]) -> None:
    """Raises ValueError unless every leaf of the layers, which are given by number, is finite."""
    for number, layer in layers.items():
        for leaf, array in block_leaves(layer).items():
            require_finite(f"{leaf} of layer {number}", count_not_finite(array), array.size)
