"""Programs that `jax.export` writes for several platforms at once, serialised and read back, called on this one."""

import jax
import jax.numpy as jnp
from jax import export

from tests.support.programs.formulas import D
from tests.support.programs.transformed import gradients

PLATFORMS = ("cpu", "cuda", "tpu")


def exported(shape):
    """The block and its gradients for any x of this shape, in which None is the size that x has."""

    def program(f, params, x):
        sizes = ", ".join(str(size) if name is None else name for name, size in zip((*shape, None), x.shape))
        symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), jnp.float32)
        return [through_bytes(function, params, symbolic)(params, x) for function in (f, gradients(f))]

    return program


def through_bytes(function, *arguments):
    written = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments).serialize(vjp_order=1)
    return export.deserialize(written).call


def differentiated_after_export(f, params, x):
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(f"b, {x.shape[1]}, {D}"), jnp.float32)
    return jax.jit(gradients(through_bytes(f, params, symbolic)))(params, x)


ANY_LENGTH = {
    "export, any length": exported((None, "t")),
    "export, any batch and length": exported(("b", "t")),
}
PROGRAMS = {
    "export, fixed sizes": exported((None, None)),
    "export, any batch": exported(("b", None)),
    **ANY_LENGTH,
    "the gradient of what was exported": differentiated_after_export,
}
