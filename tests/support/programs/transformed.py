"""JAX's transformations, loops, and remat with every policy."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.programs.formulas import loss, make_params, stack

LAYERS = 3
POLICIES = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "only mlp_out": jax.checkpoint_policies.save_only_these_names("mlp_out"),
    "only mlp_hidden": jax.checkpoint_policies.save_only_these_names("mlp_hidden"),
    "any but mlp_gate": jax.checkpoint_policies.save_anything_except_these_names("mlp_gate", "mlp_up"),
}


def gradients(f):
    """f(params, x) and its gradients with respect to both."""
    return jax.value_and_grad(lambda params, x: loss(f(params, x)), argnums=(0, 1))


def tangents(*trees):
    return jax.tree.map(jnp.cos, trees)


def vjp_of_vjp(f, params, x):
    def norm(params, x):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradients(f)(params, x)))

    return jax.grad(norm, argnums=(0, 1))(params, x)


def jvp_of_grad(f, params, x):
    return jax.jvp(gradients(f), (params, x), tangents(params, x))


def jvp(f, params, x):
    return jax.jvp(f, (params, x), tangents(params, x))


def linearize(f, params, x):
    y, linear = jax.linearize(f, params, x)
    return y, linear(*tangents(params, x))


def jacfwd(f, params, x):
    return jax.jacfwd(lambda scale: loss(f(params, x * scale)))(1.5)


def experts(f, params, x):
    stacked = stack(3)
    per_expert = jax.vmap(gradients(f), in_axes=(0, None))
    return per_expert(stacked, x), jax.vmap(f)(stacked, jnp.stack([x, 2 * x, 3 * x]))


def scan(f, params, x):
    return gradients(lambda stacked, x: lax.scan(lambda x, layer: (f(layer, x), None), x, stacked)[0])(stack(LAYERS), x)


def fori(f, params, x):
    def loop(f):
        return gradients(lambda params, x: lax.fori_loop(0, LAYERS, lambda i, x: f(params, x), x))(params, x)

    return loop(f), loop(jax.checkpoint(f))


def while_loop(f, params, x):
    def step(state):
        i, x = state
        return i + 1, f(params, x)

    return lax.while_loop(lambda state: state[0] < LAYERS, step, (0, x))[1]


def cond(f, params, x):
    def either(params, x):
        return lax.cond(jnp.sum(params.mlp.gate_proj) > 1e9, lambda x: x, lambda x: f(params, x), x)

    return gradients(either)(params, x)


def unrolled(f, params, x):
    def stack_of_layers(layers, x):
        for layer in layers:
            x = f(layer, x)
        return x

    return jax.jit(gradients(stack_of_layers))([make_params(seed) for seed in range(LAYERS)], x)


def remat(policy):
    def program(f, params, x):
        return scan(jax.checkpoint(f, policy=policy), params, x)

    return program


def donated(f, params, x):
    step = jax.jit(lambda params, x: (f(params, x), jax.tree.map(jnp.zeros_like, params)), donate_argnums=(0, 1))
    return step(jax.tree.map(jnp.copy, params), jnp.copy(x))


FORWARD_MODE = {"jvp": jvp, "linearize": linearize, "jacfwd": jacfwd}
PROGRAMS = {
    "an eager call": lambda f, params, x: f(params, x),
    "jit": lambda f, params, x: jax.jit(f)(params, x),
    "an eager grad": lambda f, params, x: gradients(f)(params, x),
    "grad in jit": lambda f, params, x: jax.jit(gradients(f))(params, x),
    "vjp of vjp": vjp_of_vjp,
    "jvp of grad": jvp_of_grad,
    **FORWARD_MODE,
    "vmap over x": lambda f, params, x: jax.vmap(gradients(f), (None, 0))(params, x),
    "vmap over params (experts)": experts,
    "vmap over an axis of length": lambda f, params, x: jax.vmap(f, (None, 1), 1)(params, x),
    "scan over layers": scan,
    "fori_loop, with and without remat": fori,
    "while_loop": while_loop,
    "cond": cond,
    "unrolled layers": unrolled,
    **{f"remat, {name}": remat(policy) for name, policy in POLICIES.items()},
    "donated arguments": donated,
}
