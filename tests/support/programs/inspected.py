"""Programs that JAX or chex inspect while they run."""

import functools

import chex
import jax
from jax.experimental import checkify

from gemma_mlp.checks import check_values
from tests.support.programs.transformed import gradients, scan


def checkified(f, params, x):
    checks = checkify.user_checks | checkify.float_checks | checkify.index_checks
    error, result = jax.jit(checkify.checkify(gradients(f), errors=checks))(params, x)
    error.throw()
    return result


def under(setting):
    def program(f, params, x):
        with setting():
            return gradients(f)(params, x), jax.jit(functools.partial(scan, f))(params, x)

    return program


PROGRAMS = {
    "check_values": lambda f, params, x: check_values(gradients(f))(params, x),
    "check_values around scan": lambda f, params, x: check_values(lambda params, x: scan(f, params, x))(params, x),
    "chexify": lambda f, params, x: chex.chexify(jax.jit(gradients(f)), async_check=False)(params, x),
    "checkify": checkified,
    "debug_nans": under(lambda: jax.debug_nans(True)),
    "debug_infs": under(lambda: jax.debug_infs(True)),
    "disable_jit": under(jax.disable_jit),
    "checking_leaks": under(jax.checking_leaks),
}
