"""The Linen shell: modules that hold and name parameters. The arithmetic is in gemma_mlp.block and gemma_mlp.op."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from gemma_mlp.adopt import NAMES, compute, qwix_rule, refuse_qwix, require_described
from gemma_mlp.block import add_modules, rms_norm
from gemma_mlp.checks import describe, require
from gemma_mlp.config import MLPConfig
from gemma_mlp.op.api import mlp, mlp_hidden
from gemma_mlp.params import BIASES, LeafSpec, MLPParams, RMSNormParams, named_leaves
from gemma_mlp.weights import LORA, LoRAWeight, QuantizedWeight

__all__ = ["MLP", "LogicalAxes", "MLPBlock", "RMSNorm", "adopt"]
DOT_GENERAL = lax.dot_general.__code__  # qwix replaces the code while it rewrites a model's matmuls


class MLP(nn.Module):
    """Gemma's gated MLP; formula, shapes and errors as in :func:`gemma_mlp.feed_forward`.

    Parameters are `gate_proj` [D, F], `up_proj` [D, F], `down_proj` [F, D] and, with `config.use_bias`,
    `gate_bias` [F], `up_bias` [F], `down_bias` [D], boxed with the logical axes `embed` and `mlp`. With
    `config.weight_dtype` each weight is a `gemma_mlp.QuantizedWeight` of two such arrays. With `config.lora` there is a
    collection `lora` of `gate_proj_lora_a` [D, rank], `gate_proj_lora_b` [rank, F] and so on.

    With `mutable=["intermediates"]` the hidden activations are sown as `hidden`.

    Attributes:
      config: sizes and numerics.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], deterministic: bool = False) -> Float[Array, "*B D"]:
        """Applies the MLP.

        Args:
          x: [*B, D].
          deterministic: True switches dropout off; otherwise a positive dropout_rate needs a `dropout` RNG.
        """
        refuse_qwix(qwix_rule(self))
        params = MLPParams(**_params(self, MLPParams.specs(self.config), self.config))
        active = self.config.dropout_rate > 0 and not deterministic
        key = self.make_rng("dropout") if active else None
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "hidden", mlp_hidden(params, x, self.config, dropout_key=key))
        return mlp(params, x, self.config, dropout_key=key)


class RMSNorm(nn.Module):
    """Gemma's RMSNorm over `config.embed_dim`, with one parameter `scale` [D]; see :func:`gemma_mlp.rms_norm`."""

    config: MLPConfig

    def setup(self):
        self.scale = _params(self, RMSNormParams.specs(self.config), self.config)["scale"]

    def __call__(self, x: Float[Array, "*B D"], *, dtype: Any = None) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result is in `dtype`, or else in `config.dtype`."""
        config = self.config
        dtype = dtype or config.dtype
        return rms_norm(self.scale, x, eps=config.norm_eps, dtype=dtype, scale_plus_one=config.scale_plus_one)


class MLPBlock(nn.Module):
    """x + post_norm(mlp(pre_norm(x))), as in :func:`gemma_mlp.mlp_block`.

    A subclass whose `setup` makes other modules of `pre_norm`, `mlp` or `post_norm` replaces them. They are called: a
    norm with its input alone, the MLP with its input, and with `deterministic=True` if the block's call was given that.
    This package's own norms are computed together with the casts around them, by their `scale`. They are called only
    under `nn.intercept_methods` and where `intermediates` are captured. The projections of :class:`MLP` are parameters
    and no modules: to replace or adapt one, replace the MLP.

    Attributes:
      config: sizes and numerics; `post_norm=False` leaves the second norm out, as in Gemma 1.
    """

    config: MLPConfig

    def setup(self):
        self.pre_norm = RMSNorm(self.config)
        self.mlp = MLP(self.config)
        self.post_norm = RMSNorm(self.config) if self.config.post_norm else None

    def __call__(self, x: Float[Array, "*B D"], deterministic: bool = False) -> Float[Array, "*B D"]:
        """Applies the block to the residual stream; arguments as for :meth:`MLP.__call__`."""
        given = {"deterministic": True} if deterministic else {}
        watched = self.is_mutable_collection("intermediates") or bool(nn.module._global_interceptor_stack)
        return add_modules(
            x,
            self.pre_norm,
            lambda x: self.mlp(x, **given),
            self.post_norm,
            own_norm=RMSNorm,
            scale_of=lambda norm: norm.scale if type(norm) is RMSNorm and not watched else None,
            config=self.config,
        )


def adopt(kind: type[nn.Module], config: MLPConfig) -> Callable:
    """Makes modules of somebody else's class compute with :func:`gemma_mlp.feed_forward`, inside of a `with` statement.

        with nn.intercept_methods(gemma_mlp.linen.adopt(FeedForward, config)):
            y = model.apply(variables, x)

    The parameters keep their names, boxes and shapes. A Linen module has no parameters before `init`, and hides the
    options of its projections (such as `precision`), so this cannot check them: `config` must describe the module.
    `dtype=None` is the common type of the parameters and x, also where the projections have a `dtype` of their own.

    The module itself computes, by its own `__call__`: in `init`, if `intermediates` are captured, if a projection has
    an adapter or a quantised kernel, and while qwix rewrites matmuls. For the arguments of a call see
    :func:`gemma_mlp.nnx.adopt`.

    Args:
      kind: a class with three submodules or parameters gate_proj, up_proj and down_proj, or wi_0, wi_1 and wo.
      config: sizes and numerics, without dropout.

    Raises:
      ValueError: at the call, if the module's parameters are others than `config` describes.
    """
    require(
        isinstance(kind, type) and issubclass(kind, nn.Module),
        "linen.adopt takes the class of the modules to adopt, since Linen copies modules whenever they are applied.",
        describe(kind),
        "pass the class, such as FeedForward, not an instance.",
    )
    require(config.dropout_rate == 0, "An adopted module has no dropout.", repr(config), "set dropout_rate=0.")

    def interceptor(next_function, args, kwargs, context):
        module = context.module
        if not isinstance(module, kind) or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        rewritten = lax.dot_general.__code__ is not DOT_GENERAL
        if module.is_initializing() or module.is_mutable_collection("intermediates") or rewritten:
            return next_function(*args, **kwargs)
        tree = nn.unbox(module.variables.get("params", {}))
        names = next((names for names in NAMES if set(names) == set(tree)), None)
        require(
            names is not None,
            f"The parameters of an adopted {kind.__name__} must be {' or '.join(map(', '.join, NAMES))}.",
            ", ".join(tree) or "none",
            "adopt a module with these names only; what else it holds would be ignored.",
        )
        assert names is not None
        leaves = [tree[name] if isinstance(tree[name], Mapping) else {"kernel": tree[name]} for name in names]
        others = {name for leaf in leaves for name in leaf} - {"kernel", "bias"}
        require(
            all("lora" in name for name in others),
            f"The projections of a {kind.__name__} must hold a kernel, perhaps a bias and LoRA, and nothing else.",
            ", ".join(sorted(others)),
            "keep the module as it was: its other parameters would be ignored.",
        )
        kernels, biases = [leaf["kernel"] for leaf in leaves], ["bias" in leaf for leaf in leaves]
        if others or not all(hasattr(kernel, "dtype") for kernel in kernels):  # adapted, or quantised by qwix
            return next_function(*args, **kwargs)
        require_described(kind.__name__, [kernel.shape for kernel in kernels], biases, config)
        params = MLPParams(*kernels, **{name: leaf["bias"] for name, leaf in zip(BIASES, leaves) if "bias" in leaf})
        return compute(kind.__name__, config, params, *args, **kwargs)

    return interceptor


class LogicalAxes(nn.LogicallyPartitioned):
    """Logical axis names that `nnx.bridge` can carry over to NNX without a mesh."""

    def to_nnx_metadata(self) -> dict[str, Any]:
        return super().to_nnx_metadata() | {"eager_sharding": False}


def _params(module: nn.Module, specs: MLPParams | RMSNormParams, config: MLPConfig) -> dict[str, Any]:
    return {name: _leaf(module, name, spec, config) for name, spec in named_leaves(specs).items()}


def _leaf(module, name, spec, config):
    """A parameter of a module, or the parameters that make up a quantised or adapted weight."""

    def boxed(spec: LeafSpec):
        def init(key, shape=spec.shape, dtype=config.param_dtype):
            return LogicalAxes(spec.init(key, shape, dtype), spec.axes)

        return init

    if isinstance(spec, LoRAWeight):

        def adapter(part):
            make = boxed(getattr(spec, part))
            return nn.unbox(module.variable("lora", f"{name}_{part}", lambda: make(module.make_rng("params"))).value)

        lora_a, lora_b = map(adapter, LORA)
        return LoRAWeight(_leaf(module, name, spec.base, config), lora_a, lora_b, spec.factor)
    # DeepMind's models replace `param` by one that needs a shape, and that may ask for another dtype.
    if isinstance(spec, QuantizedWeight):

        def quantized(key, shape, dtype):
            return QuantizedWeight(boxed(spec.qvalue)(key, shape), boxed(spec.scale)(key, dtype=dtype))

        return module.param(name, quantized, spec.qvalue.shape, config.param_dtype)
    return module.param(name, boxed(spec), spec.shape, config.param_dtype)
