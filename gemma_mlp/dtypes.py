"""Which dtypes the block computes in, and the numerical contract's accumulation type."""

from typing import Any

import jax
import jax.numpy as jnp

from gemma_mlp.checks import describe, require

DTYPES = ("bfloat16", "float32", "float64")  # from narrow to wide


def dtype_name(name: str, dtype: Any) -> str:
    """The canonical name of a supported dtype, given as a name, a NumPy dtype or a JAX scalar type.

    Raises:
      ValueError: for any other. float16 is refused because the down projection of real Gemma weights exceeds its
        largest number, 65504.
    """
    try:
        canonical = jnp.dtype(dtype).name if dtype is not None else "None"
    except TypeError:
        canonical = repr(dtype)
    require(
        canonical != "float16",
        f"{name} must not be float16: the down projection of real Gemma weights exceeds its largest number, 65504.",
        canonical,
        "use bfloat16, which has the range of float32.",
    )
    require(canonical in DTYPES, f"{name} must be one of {', '.join(DTYPES)}.", canonical, "use one of these.")
    return canonical


def compute_dtype(dtype: Any, **arrays: Any) -> jnp.dtype:
    """`dtype`, or if that is None the common type of `arrays`. Raises ValueError unless all are supported."""
    for name, array in arrays.items():
        require(
            hasattr(array, "dtype") and array.dtype.name in DTYPES,
            f"{name} must be an array of {', '.join(DTYPES)}.",
            describe(array),
            "convert it first; float16 overflows on real Gemma weights, bfloat16 does not.",
        )
    common = widest(*(array.dtype for array in arrays.values())) if dtype is None else dtype_name("dtype", dtype)
    require(
        common != "float64" or jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
        "float64 needs JAX's 64-bit mode.",
        "dtype float64 with jax_enable_x64 off",
        'call jax.config.update("jax_enable_x64", True) at start-up, or use float32.',
    )
    return jnp.dtype(common)


def accumulation_dtype(*dtypes: Any) -> jnp.dtype:
    """The dtype of sums and of element-wise work: float32, or float64 if one of `dtypes` is."""
    return jnp.dtype(widest("float32", *dtypes))


def widest(*dtypes: Any) -> str:
    """The widest of some supported dtypes, to which they promote."""
    return max((jnp.dtype(dtype).name for dtype in dtypes), key=DTYPES.index)
