"""Programs on several devices: `shard_map`, `pmap`, and meshes that XLA splits arrays over.

The mesh is data 2 x fsdp 1 x tensor 2. Programs named "with rules" give the block `axis_rules` as well.
"""

import functools

import jax
import jax.numpy as jnp
from jax import P, lax
from jax.sharding import AxisType, NamedSharding

from gemma_mlp import MLPBlockParams, MLPConfig, MLPParams, sharding
from tests.support.meshes import make_mesh
from tests.support.programs.formulas import D, F, loss, stack
from tests.support.programs.transformed import gradients

SPLIT_F = MLPParams(P(None, "tensor"), P(None, "tensor"), P("tensor", None))


def mesh_of(axis_type=AxisType.Auto):
    return make_mesh(fsdp=1, tensor=2, axis_type=axis_type, data=2)


def data_parallel(axes=("data", "fsdp", "tensor"), rules=None, check_vma=True):
    """Each device has its share of the batch; all have all parameters. The gradient is taken inside and outside."""

    def program(f, params, x):
        f = f.with_rules(rules)

        def gradient(params, x):
            dparams = jax.grad(lambda params: loss(f(params, x)))(params)
            return dparams if check_vma else lax.psum(dparams, "data")  # which JAX adds by itself if it checks

        with jax.set_mesh(mesh_of()):
            run = functools.partial(jax.shard_map, axis_names=set(axes), check_vma=check_vma, in_specs=(P(), P("data")))
            inside, outside = run(gradient, out_specs=P()), gradients(run(f, out_specs=P("data")))
            return jax.jit(inside)(params, x), jax.jit(outside)(params, x)

    return program


def tensor_parallel(data=False, check_vma=True):
    """Each device has a part of F; the user adds y up."""

    def program(f, params, x):
        tokens = P("data") if data else P()

        def mlp(params, x):
            return lax.psum(f.mlp(params, x), "tensor")

        with jax.set_mesh(mesh_of()):
            run = functools.partial(jax.shard_map, check_vma=check_vma)
            outside = gradients(run(mlp, in_specs=(SPLIT_F, tokens), out_specs=tokens))
            return jax.jit(outside)(params.mlp, x)

    return program


def pipeline(f, params, x):
    """Two stages with a layer each: microbatches go from one to the next by ppermute."""
    micro = jnp.stack([x, 2 * x, 3 * x])

    def stages(params, micro):
        params, stage = jax.tree.map(lambda leaf: leaf[0], params), lax.axis_index("data")

        def tick(carry, i):
            y = f(params, jnp.where(stage == 0, micro[jnp.minimum(i, 2)], carry))
            return lax.ppermute(y, "data", [(0, 1), (1, 0)]), y

        carry = lax.pcast(jnp.zeros_like(micro[0]), ("data",), to="varying")
        return lax.scan(tick, carry, jnp.arange(4))[1][None]

    with jax.set_mesh(make_mesh(fsdp=1, tensor=1, data=2)):
        run = jax.shard_map(stages, in_specs=(P("data"), P()), out_specs=P("data"))
        return jax.jit(gradients(lambda params, micro: run(params, micro)[1, 1:]))(stack(2), micro)


def pmap(rules=None):
    def program(f, params, x):
        f = f.with_rules(rules)

        def step(params, x):
            return lax.psum(jax.grad(lambda params: loss(f(params, x)))(params), "data")

        return jax.pmap(step, axis_name="data", in_axes=(None, 0), devices=jax.devices()[:2])(params, x)

    return program


def on_mesh(axis_type, rules=None):
    """XLA splits the batch over data, and F over tensor."""

    def program(f, params, x):
        f, mesh = f.with_rules(rules), mesh_of(axis_type if f.explicit_axes else AxisType.Auto)
        specs = MLPBlockParams.specs(MLPConfig(D, F))
        with jax.set_mesh(mesh):
            params = jax.device_put(params, sharding.named_shardings(specs, mesh, sharding.RULES))
            x = jax.device_put(x, NamedSharding(mesh, P("data")))
            return jax.jit(f)(params, x), jax.jit(gradients(f))(params, x)

    return program


def spmd_axis_name(f, params, x):
    """A vmap over the axis of x that data splits, with rules for the others."""
    rules = tuple((name, None if name == "batch" else axes) for name, axes in sharding.RULES)
    f = f.with_rules(rules)
    with jax.set_mesh(mesh_of()):
        return jax.jit(jax.vmap(gradients(f), (None, 0), spmd_axis_name="data"))(params, x[:, None])


PROGRAMS = {
    "shard_map over data": data_parallel(),
    "shard_map over data, check_vma off": data_parallel(check_vma=False),
    "shard_map over data, the rest automatic": data_parallel(["data"]),
    "shard_map over data, with rules": data_parallel(rules=sharding.RULES),
    "shard_map over data, the rest automatic, with rules": data_parallel(["data"], sharding.RULES),
    "shard_map over tensor": tensor_parallel(),
    "shard_map over tensor, check_vma off": tensor_parallel(check_vma=False),
    "shard_map over data and tensor": tensor_parallel(data=True),
    "shard_map with a pipeline": pipeline,
    "pmap": pmap(),
    "pmap, with rules": pmap(sharding.RULES),
    "a mesh of automatic axes": on_mesh(AxisType.Auto),
    "a mesh of automatic axes, with rules": on_mesh(AxisType.Auto, sharding.RULES),
    "a mesh of explicit axes": on_mesh(AxisType.Explicit),
    "a mesh of explicit axes, with rules": on_mesh(AxisType.Explicit, sharding.RULES),
    "vmap with spmd_axis_name, with rules": spmd_axis_name,
}
