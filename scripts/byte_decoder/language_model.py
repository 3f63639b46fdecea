"""The decoder as two pure functions of one parameter tree, the same for NNX and for Linen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh

import gemma_mlp
from byte_decoder import linen_model, nnx_model
from gemma_mlp.checks import require
from gemma_mlp.sharding import Rules, named_shardings

Params = dict[str, Any]


class LanguageModel(NamedTuple):
    """`init(key)` returns parameters as nested dicts. `logits(params, tokens)` returns next-byte logits [B, T, 256]."""

    init: Callable[[jax.Array], Params]
    logits: Callable[[Params, jax.Array], jax.Array]


def make(api: str, config: gemma_mlp.MLPConfig, num_layers: int, num_heads: int) -> LanguageModel:
    """The decoder in NNX or in Linen. Each can compute with the parameters of the other."""
    require(api in ("nnx", "linen"), "config.api must be nnx or linen.", repr(api), "use one of these names.")
    return (_nnx if api == "nnx" else _linen)(config, num_layers, num_heads)


def shardings(api: str, sizes: tuple[gemma_mlp.MLPConfig, int, int], mesh: Mesh, rules: Rules) -> Params:
    """The shardings on `mesh` of the parameters of `make(api, *sizes)`, as a tree."""
    if api == "nnx":
        state = nnx.state(nnx.eval_shape(lambda: nnx_model.Decoder(*sizes, rngs=nnx.Rngs(params=0))))
        return nnx.to_pure_dict(named_shardings(state, mesh, rules))
    variables = jax.eval_shape(linen_model.Decoder(*sizes).init, jax.random.key(0), jnp.zeros((1, 1), "int32"))
    return nn.unbox(named_shardings(variables["params"], mesh, rules))


def pure_functions(create: Callable[[jax.Array], nnx.Module]) -> tuple[Callable, Callable]:
    """Turns the NNX module that `create(key)` makes into two functions.

    Returns:
      init: key -> params, as nested dicts.
      apply: (params, *args) -> the module's output.
    """

    def init(key):
        return nnx.to_pure_dict(nnx.state(create(key)))

    # This runs once, outside of jax.set_mesh. Inside of it Flax would ask for rules that map the logical axes.
    graphdef, abstract = nnx.split(nnx.eval_shape(create, jax.random.key(0)))

    def apply(params, *args):
        state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy, to be filled
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)(*args)

    return init, apply


def _nnx(*sizes) -> LanguageModel:
    return LanguageModel(*pure_functions(lambda key: nnx_model.Decoder(*sizes, rngs=nnx.Rngs(params=key))))


def _linen(*sizes) -> LanguageModel:
    model = linen_model.Decoder(*sizes)

    def init(key):
        return nn.unbox(model.init(key, jnp.zeros((1, 1), "int32"))["params"])

    def logits(params, tokens) -> Any:
        return model.apply({"params": params}, tokens)

    return LanguageModel(init, logits)
