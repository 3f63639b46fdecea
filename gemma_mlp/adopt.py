"""Other people's MLP modules, computed by this package's feed-forward. README.md has a recipe for each library."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gemma_mlp.checks import describe, require
from gemma_mlp.config import MLPConfig
from gemma_mlp.mesh import Rules
from gemma_mlp.op.api import mlp
from gemma_mlp.params import BIASES, MLPParams

M = TypeVar("M", bound=nnx.Module)
# The attributes of gate, up and down: in Flax's example, Tunix, bonsai and Hugging Face; in MaxText and T5X.
NAMES = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
# Attributes of Flax's and MaxText's projections that change what a call computes, with the value that changes nothing.
NEUTRAL = {
    "precision": (None,),
    "preferred_element_type": (None,),
    "dot_general": (lax.dot_general,),
    "promote_dtype": (dtypes.promote_dtype,),
    "quant": (None,),
    "matmul_precision": (None, "default"),
    "parameter_memory_host_offload": (False,),
}
SWITCHES = ("deterministic", "decode", "rngs")  # arguments of a call that change nothing in an MLP without dropout


def adopt(module: M, config: MLPConfig) -> M:
    """Makes an NNX module of somebody else's compute with :func:`gemma_mlp.feed_forward`, and returns it.

        for layer in model.layers:
            layer.mlp = gemma_mlp.nnx.adopt(layer.mlp, config)

    The module stays the object that it is, with its variables, their names and their metadata. So checkpoints, loaders,
    sharding code, optimizers and adapters go on working. Only its class changes, to a subclass with another `__call__`.

    The module itself computes, by its own `__call__`:

    - if a projection has an adapter (`nnx.LoRA`, `nnx.LoRALinear`, qwix's or Tunix's LoRA) or a quantised kernel, or if
      qwix is rewriting its matmuls;
    - under `nnx.capture`, so that each projection's output can be captured;
    - if the Flax example's `sow_config` asks for the largest elements of h (`mlp_hidden_topk`).

    A call takes what the module's own call takes. `intermediate_sharding` and `out_sharding` (a `NamedSharding` or a
    `PartitionSpec`) say how h and y are split over the mesh in force. Other arguments must not ask for anything.

    Args:
      module: has three projections, called gate_proj, up_proj and down_proj, or wi_0, wi_1 and wo. Each is an
        `nnx.Param` [in, out], or a module with a `kernel` [in, out] and perhaps a `bias` [out].
      config: sizes and numerics. `activation` must be the module's. With `dtype=None` the projections' own `dtype`
        counts. `dropout_rate` must be 0: there is no stream for it in the module's state.

    Raises:
      ValueError: if the module holds something that `config` does not describe and the call would ignore.
    """
    names = next((names for names in NAMES if all(hasattr(module, name) for name in names)), None)
    require(
        isinstance(module, nnx.Module) and names is not None,
        f"adopt needs an NNX module with {' or '.join(map(', '.join, NAMES))}.",
        f"{type(module).__name__} with {', '.join(name for name, _ in _children(module)) or 'none'}",
        "split a fused projection in two, or give yours these names.",
    )
    assert names is not None
    require(
        config.dropout_rate == 0,
        "adopt keeps a module's state as it is, and so has no stream of keys for dropout.",
        f"dropout_rate {config.dropout_rate}",
        "set dropout_rate=0, or use gemma_mlp.nnx.MLP.",
    )
    for name, child in _children(module):
        require(
            name in names or (isinstance(child, nnx.Dropout) and child.rate == 0),
            "adopt computes with three projections and would ignore everything else in the module.",
            f"{name}, a {type(child).__name__}",
            "apply it outside of the module, or set the rate of a dropout to 0.",
        )
    projections = [getattr(module, name) for name in names]
    for name, projection in zip(names, projections):
        _require_known(name, projection)
    bases = [_base(projection) for projection in projections]
    shapes = [_kernel(base).get_value().shape for base in bases]
    require_described(type(module).__name__, shapes, [_bias(base) is not None for base in bases], config)
    if not hasattr(module, "gemma_mlp_config"):
        module.__class__ = _adopted(type(module), names)
    module.gemma_mlp_config = config  # pyright: ignore[reportAttributeAccessIssue]
    return module


@functools.cache  # one class for each, so that all layers of a model have one type
def _adopted(kind: Any, names: tuple[str, ...]) -> Any:
    original: Callable = kind.__call__

    @functools.wraps(original)
    def __call__(self, x, *args, **kwargs):  # noqa: N807
        projections = [getattr(self, name) for name in names]
        if hasattr(self, "__captures__") or _sows(self) or not all(map(_is_plain, projections)):
            return original(self, x, *args, **kwargs)
        config = dataclasses.replace(self.gemma_mlp_config, dtype=_dtype(projections, self.gemma_mlp_config))
        return compute(kind.__name__, config, _params(projections), x, *args, **kwargs)

    return type(kind)(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})


def compute(kind, config, params, x, *switches, intermediate_sharding=None, out_sharding=None, **options) -> jax.Array:
    """The MLP, called with the arguments of another library's module; `kind` is its name, for the errors."""
    ignored = [
        f"{name} {value!r}"
        for name, value in options.items()
        if name not in SWITCHES and value is not None and value is not False
    ]
    ignored += [f"{value!r} after x" for value in switches if not isinstance(value, bool | None)]
    require(
        not ignored,
        f"The call of an adopted {kind} takes x, intermediate_sharding, out_sharding and {', '.join(SWITCHES)}.",
        ", ".join(ignored),
        "leave it out, or keep the module as it was.",
    )
    if intermediate_sharding is not None:
        config = dataclasses.replace(config, axis_rules=_rules(intermediate_sharding, jnp.ndim(x)))
    y = mlp(params, x, config)
    return y if out_sharding is None else _split(y, out_sharding)


def _children(module: Any) -> Iterator[tuple[str, Any]]:
    """The modules, lists and variables in a module, by name."""
    return (
        ((str(name), child) for name, child in nnx.iter_children(module))
        if isinstance(module, nnx.Module)
        else iter(())
    )


def _sows(module: Any) -> bool:
    """Whether the module's own call stores a part of h in the module. Flax's example has an option for that."""
    return bool(getattr(getattr(module, "sow_config", None), "mlp_hidden_topk", 0))


def _kernel(projection: Any) -> Any:
    return projection if isinstance(projection, nnx.Variable) else getattr(projection, "kernel", None)


def _bias(projection: Any) -> nnx.Variable | None:
    return None if isinstance(projection, nnx.Variable) else getattr(projection, "bias", None)


def _is_dense(projection: Any) -> bool:
    """Whether it is a matrix, and perhaps a bias, and nothing else."""
    kernel = _kernel(projection)
    matrix = isinstance(kernel, nnx.Variable) and getattr(kernel.get_value(), "ndim", None) == 2
    return matrix and {name for name, _ in _children(projection)} <= {"kernel", "bias"}


def _is_plain(projection: Any) -> bool:
    """Whether it is dense, and nobody rewrites its matmul."""
    return _is_dense(projection) and qwix_rule(projection) is None


def qwix_rule(self: Any) -> Any:
    """What qwix does to this module's matmuls in the call that is running, or None."""
    # qwix searches the stack for a variable `self`, which is the argument here; it knows NNX modules by `qwix_path`.
    qconfig = sys.modules.get("qwix._src.qconfig")
    known = not isinstance(self, nnx.Module) or hasattr(self, "qwix_path")
    return qconfig.get_current_rule("dot_general") if qconfig is not None and known else None


def refuse_qwix(rule: Any) -> None:
    """Raises ValueError if qwix has a rule for one of this package's own modules."""
    require(
        rule is None,
        "qwix must not rewrite the matmuls of this package's modules: it would find some of their weights and not all.",
        f"qwix's {type(rule).__name__} for {getattr(rule, 'module_path', '')!r}",
        "leave the MLP out of the rule's module_path, and call gemma_mlp.nnx.quantize or add_lora; for Linen set "
        "weight_dtype or lora in the config. (An MLP of nnx.Linear with gemma_mlp.nnx.adopt is left to qwix.)",
    )


def _require_known(name: str, projection: Any) -> None:
    """A dense projection with or without LoRA, whose call does nothing else."""
    while isinstance(projection, nnx.LoRA) and projection.base_module is not None:
        projection = projection.base_module
    children = _children(projection)
    strange = {child for child, value in children if not isinstance(value, nnx.LoRAParam | nnx.LoRA)} - {
        "kernel",
        "bias",
    }
    kernel = _kernel(projection)
    require(
        isinstance(kernel, nnx.Variable) and getattr(kernel.get_value(), "ndim", None) == 2,
        f"{name} must be an nnx.Param [in, out] or a module with a kernel [in, out].",
        describe(kernel.get_value() if isinstance(kernel, nnx.Variable) else kernel),
        "adopt the module before it is quantised, and reshape a kernel of more axes.",
    )
    require(
        not strange,
        f"{name} must hold a kernel, perhaps a bias and LoRA, and nothing else.",
        ", ".join(sorted(strange)),
        "keep the module as it was: its other parameters would be ignored.",
    )
    for option, neutral in NEUTRAL.items():
        value = getattr(projection, option, neutral[0])
        require(
            any(value is known or value == known for known in neutral),
            f"{name} must be a plain matmul.",
            f"{option} {value!r}",
            "keep the module as it was, or use jax.default_matmul_precision or the config instead.",
        )


def require_described(kind: str, shapes: list[tuple[int, ...]], biases: list[bool], config: MLPConfig) -> None:
    """Raises ValueError unless `config` has the sizes and biases of the three projections."""
    sizes = (config.embed_dim, config.hidden_dim)
    require(
        shapes == [sizes, sizes, sizes[::-1]],
        f"The projections must be [D, F], [D, F] and [F, D], with the config's sizes {sizes}.",
        ", ".join(map(str, shapes)),
        f"use the config of this {kind}; hidden_dim is the width of one branch.",
    )
    require(
        biases == [config.use_bias] * 3,
        "All three projections must have a bias, with use_bias=True, or none, with use_bias=False.",
        f"biases {biases}, use_bias {config.use_bias}",
        "set use_bias, and give a missing bias as zeros.",
    )


def _base(projection: Any) -> Any:
    return _base(projection.base_module) if isinstance(projection, nnx.LoRA) else projection


def _dtype(projections: list[Any], config: MLPConfig) -> Any:
    """The config's compute dtype, or else the projections' own, on which they must agree."""
    modules = [projection for projection in projections if not isinstance(projection, nnx.Variable)]
    own = {jnp.dtype(p.dtype).name for p in modules if getattr(p, "dtype", None) is not None}
    require(
        config.dtype is not None or len(own) <= 1,
        "The projections must compute in one dtype.",
        ", ".join(sorted(own)),
        "say which with the config's dtype.",
    )
    return config.dtype or next(iter(own), None)


def _params(projections: list[Any]) -> MLPParams:
    kernels = (_kernel(projection)[...] for projection in projections)
    biases = {name: bias[...] for name, p in zip(BIASES, projections) if (bias := _bias(p)) is not None}
    return MLPParams(*kernels, **biases)


def _rules(sharding: NamedSharding | PartitionSpec, ndim: int) -> Rules:
    """The rules by which h is split like that; the embed axis of x and y is not split."""
    spec = tuple(sharding.spec if isinstance(sharding, NamedSharding) else sharding)
    spec = (*spec, *(None,) * (ndim - len(spec)))
    require(
        not jax.sharding.get_abstract_mesh().empty,
        "intermediate_sharding needs the mesh in force.",
        f"{sharding} without a mesh",
        "call the model under jax.set_mesh(mesh).",
    )
    between = spec[1:-1] if ndim >= 3 else (None,)
    require(
        len(spec) == ndim and ndim >= 2 and not any(between[:-1]),
        "intermediate_sharding must split the first axis of h, its length and its last axis.",
        f"{sharding} for an x of {ndim} axes",
        "leave it out; XLA then decides.",
    )
    return ("batch", spec[0]), ("length", between[-1]), ("embed", None), ("mlp", spec[-1])


def _split(y: jax.Array, sharding: NamedSharding | PartitionSpec) -> jax.Array:
    explicit = AxisType.Explicit in jax.typeof(y).sharding.mesh.axis_types
    return jax.sharding.reshard(y, sharding) if explicit else lax.with_sharding_constraint(y, sharding)
