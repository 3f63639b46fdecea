"""The block as an NNX and as a Linen module, under Flax's own transformations, and in `nnx.bridge`."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from jax import P

from tests.support.meshes import make_mesh
from tests.support.programs.formulas import linen_variables, loss, make_params, params_of, stack

LAYERS = 3


def module_loss(module, x):
    return loss(module(x))


def nnx_grad(f, params, x):
    return params_of(nnx.grad(module_loss)(f.module(params), x))


def nnx_value_and_grad_in_jit(f, params, x):
    value, gradient = nnx.jit(nnx.value_and_grad(module_loss))(f.module(params), x)
    return value, params_of(gradient)


def stacked(f):
    """A module whose parameters have a leading axis of layers."""
    layers = [nnx.split(f.module(make_params(seed))) for seed in range(LAYERS)]
    states = [state for _, state in layers]
    return nnx.merge(layers[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def nnx_scan(f, params, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def layers(module, x):
        return module(x)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def remat_layers(module, x):
        return module(x)

    def of(layers):
        return params_of(nnx.grad(lambda module, x: loss(layers(module, x)))(stacked(f), x))

    return layers(stacked(f), x), of(layers), of(remat_layers)


def nnx_vmap(f, params, x):
    return nnx.vmap(lambda module, x: module(x), in_axes=(0, None))(stacked(f), x)


def nnx_shard_map(f, params, x):
    mesh = make_mesh(fsdp=1, tensor=1, data=2)
    run = nnx.shard_map(lambda module, x: module(x), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    return run(f.module(params), x)


def nnx_cached_partial(f, params, x):
    call = nnx.cached_partial(nnx.jit(lambda module, x: module(x)), f.module(params))
    return call(x), call(2 * x)


def linen_apply(f, params, x):
    def of(module):
        def value(variables):
            return loss(module.apply(variables, x))

        return jax.value_and_grad(value)(linen_variables(params))

    return of(f.linen()), jax.jit(lambda: of(f.linen()))()


def linen_lifted(lift):
    def program(f, params, x):
        module = type(f.linen())
        arguments = (f.linen().config,) if hasattr(f.linen(), "config") else ()
        return jax.value_and_grad(lambda v: loss(lift(module)(*arguments).apply(v, x)))(linen_variables(params))

    return program


class LinenLayers(nn.Module):
    """A scan over layers, with remat."""

    layer: nn.Module
    remat: bool

    @nn.compact
    def __call__(self, x):
        body = nn.remat(call, prevent_cse=False) if self.remat else call
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scan(self.layer, x)[0]


def call(module, x):
    return module(x), None


def linen_scan(remat):
    def program(f, params, x):
        variables = {"params": {"layer": linen_variables(stack(LAYERS))["params"]}}
        layers = LinenLayers(f.linen(), remat)
        return jax.value_and_grad(lambda v: loss(layers.apply(v, x)))(variables)

    return program


def linen_vmap(f, params, x):
    module = f.linen()
    arguments = (module.config,) if hasattr(module, "config") else ()
    lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    experts = nn.vmap(type(module), in_axes=None, axis_size=LAYERS, **lift)
    return experts(*arguments).apply(linen_variables(stack(LAYERS)), x)


def bridge_to_nnx(f, params, x):
    module = bridge.ToNNX(f.linen(), rngs=nnx.Rngs(0)).lazy_init(x)
    nnx.update(module, linen_variables(params)["params"])
    return module(x)


def bridge_to_linen(f, params, x):
    module = bridge.ToLinen(lambda rngs: f.module(params), skip_rng=False)
    variables = module.init(jax.random.key(0), x)
    return module.apply(variables, x)


PROGRAMS = {
    "an NNX module": lambda f, params, x: f.module(params)(x),
    "nnx.jit": lambda f, params, x: nnx.jit(lambda module, x: module(x))(f.module(params), x),
    "nnx.grad": nnx_grad,
    "nnx.value_and_grad in nnx.jit": nnx_value_and_grad_in_jit,
    "nnx.scan over layers, with and without remat": nnx_scan,
    "nnx.vmap over experts": nnx_vmap,
    "nnx.shard_map": nnx_shard_map,
    "nnx.cached_partial": nnx_cached_partial,
    "a Linen module": linen_apply,
    "nn.jit": linen_lifted(nn.jit),
    "nn.remat": linen_lifted(nn.remat),
    "nn.scan over layers": linen_scan(remat=False),
    "nn.scan over layers, with remat": linen_scan(remat=True),
    "nn.vmap over experts": linen_vmap,
    "bridge.ToNNX": bridge_to_nnx,
    "bridge.ToLinen": bridge_to_linen,
}
