"""The block in two ways with one interface: the package's, and the plain formula."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import gemma_mlp
from gemma_mlp import MLPBlockParams, MLPConfig, MLPParams, RMSNormParams, feed_forward, mlp_block

D, F, EPS = 8, 256, 1e-6  # the backward pass goes through F in slices of 128


def loss(y):
    """A scalar that depends on every element of y, even if there is none."""
    return jnp.sum(jnp.sqrt(1 + y * y))


def make_params(seed=0):
    """Parameters of one block, with norms that are not at their initial zeros."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = MLPBlockParams.init(MLPConfig(D, F), keys[0])
    norms = (RMSNormParams(0.3 * jax.random.normal(key, (D,))) for key in keys[1:])
    return MLPBlockParams(next(norms), params.mlp, next(norms))


def stack(count, make=make_params):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(make(seed) for seed in range(count)))


@dataclasses.dataclass(frozen=True)
class Ours:
    """The package's block."""

    explicit_axes = True
    config: MLPConfig

    def __call__(self, params, x):
        return mlp_block(params, x, self.config)

    def mlp(self, params, x):
        options = {name: getattr(self.config, name) for name in ("save", "chunk_size", "axis_rules", "dtype")}
        return feed_forward(params, x, **options)

    def with_rules(self, rules):
        return Ours(dataclasses.replace(self.config, axis_rules=rules))

    def module(self, params):
        module = gemma_mlp.nnx.MLPBlock(self.config, rngs=nnx.Rngs(0))
        fill(module, params)
        return module

    def linen(self):
        return gemma_mlp.linen.MLPBlock(self.config)


@dataclasses.dataclass(frozen=True)
class Plain:
    """Hugging Face's `Gemma2MLP` and `Gemma2RMSNorm`, in float32."""

    explicit_axes = False  # there JAX asks for an `out_sharding` of every matmul that adds over devices

    def __call__(self, params, x):
        y = self.mlp(params.mlp, norm(params.pre_norm.scale, x))
        return x + norm(params.post_norm.scale, y)

    def mlp(self, params, x):
        hidden = jax.nn.gelu(x @ params.gate_proj, approximate=True) * (x @ params.up_proj)
        return hidden @ params.down_proj

    def with_rules(self, rules):
        return self

    def module(self, params):
        module = PlainModule()
        fill(module, params)
        return module

    def linen(self):
        return PlainLinen()


def norm(scale, x):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * (1 + scale)


WEIGHTS = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
LEAVES = ["pre_norm.scale", *(f"mlp.{name}" for name in WEIGHTS), "post_norm.scale"]


def leaf(tree, path):
    for name in path.split("."):
        tree = getattr(tree, name)
    return tree


def fill(module, params):
    for path in LEAVES:
        leaf(module, path).set_value(leaf(params, path))


def params_of(module):
    """The parameters of an NNX module, or of the gradient of one."""
    values = {path: leaf(module, path)[...] for path in LEAVES}
    norms = (RMSNormParams(values[f"{name}.scale"]) for name in ("pre_norm", "post_norm"))
    return MLPBlockParams(next(norms), MLPParams(*(values[f"mlp.{name}"] for name in WEIGHTS)), next(norms))


def linen_variables(params):
    named = {name: {"scale": getattr(params, name).scale} for name in ("pre_norm", "post_norm")}
    return {"params": named | {"mlp": {name: getattr(params.mlp, name) for name in WEIGHTS}}}


class PlainNorm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.zeros(D))


class PlainMLP(nnx.Module):
    def __init__(self):
        self.gate_proj, self.up_proj, self.down_proj = (nnx.Param(jnp.zeros(shape)) for shape in WEIGHTS.values())


class PlainModule(nnx.Module):
    def __init__(self):
        self.pre_norm, self.mlp, self.post_norm = PlainNorm(), PlainMLP(), PlainNorm()

    def __call__(self, x):
        return Plain()(params_of(self), x)


class Leaves(nn.Module):
    shapes: dict

    @nn.compact
    def __call__(self):
        return {name: self.param(name, nn.initializers.zeros, shape) for name, shape in self.shapes.items()}


class PlainLinen(nn.Module):
    def setup(self):
        self.pre_norm, self.post_norm = Leaves({"scale": (D,)}), Leaves({"scale": (D,)})
        self.mlp = Leaves(WEIGHTS)

    def __call__(self, x):
        norms = [RMSNormParams(**leaves()) for leaves in (self.pre_norm, self.post_norm)]
        return Plain()(MLPBlockParams(norms[0], MLPParams(**self.mlp()), norms[1]), x)
