"""The decoder as two pure functions of one parameter tree, the same for NNX and for Linen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

import gemma_mlp
from byte_decoder import linen_model, nnx_model
from gemma_mlp.checks import require_choice
from gemma_mlp.sharding import Rules, named_shardings

Params = dict[str, Any]


class LanguageModel(NamedTuple):
    """`init(key)` returns what is trained, as nested dicts: all parameters, or only the adapters if there are any.

    `logits(params, tokens)` takes all parameters, joined by :func:`join` if some are frozen, and returns next-byte
    logits [B, T, 256].
    """

    init: Callable[[jax.Array], Params]
    logits: Callable[[Params, jax.Array], jax.Array]


def make(api: str, config: gemma_mlp.MLPConfig, num_layers: int, num_heads: int) -> LanguageModel:
    """The decoder in NNX or in Linen. Each can compute with the parameters of the other."""
    require_choice("config.api", api, ("nnx", "linen"))
    return (_nnx if api == "nnx" else _linen)(config, num_layers, num_heads)


def shardings(api: str, sizes: tuple[gemma_mlp.MLPConfig, int, int], mesh: Mesh, rules: Rules) -> Params:
    """The shardings on `mesh` of what `make(api, *sizes).init` returns, as a tree."""
    if api == "nnx":
        module = nnx.eval_shape(lambda: nnx_model.Decoder(*sizes, rngs=nnx.Rngs(params=0)))
        return nnx.to_pure_dict(named_shardings(nnx.state(module, _trained_kind(sizes[0])), mesh, rules))
    variables = jax.eval_shape(linen_model.Decoder(*sizes).init, jax.random.key(0), jnp.zeros((1, 1), "int32"))
    return nn.unbox(named_shardings(_trained_collection(variables), mesh, rules))


def join(frozen: Params, trained: Params) -> Params:
    """The parameters of both trees in one."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained))


def pure_functions(create: Callable[[jax.Array], nnx.Module], trained: Any = nnx.Param) -> tuple[Callable, Callable]:
    """Turns the NNX module that `create(key)` makes into two functions.

    Returns:
      init: key -> those of the parameters that are of the type `trained`, as nested dicts.
      apply: (params, *args) -> the module's output.
    """

    def init(key):
        return nnx.to_pure_dict(nnx.state(create(key), trained))

    # This runs once, outside of jax.set_mesh. Inside of it Flax would ask for rules that map the logical axes.
    graphdef, abstract = nnx.split(nnx.eval_shape(create, jax.random.key(0)))

    def apply(params, *args):
        state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy, to be filled
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)(*args)

    return init, apply


def _nnx(*sizes) -> LanguageModel:
    init, apply = pure_functions(
        lambda key: nnx_model.Decoder(*sizes, rngs=nnx.Rngs(params=key)), _trained_kind(sizes[0])
    )

    def is_quantized(node):
        return isinstance(node, gemma_mlp.QuantizedWeight)

    def logits(params, tokens):  # a quantised weight is a module of two variables in NNX
        return apply(jax.tree.map(lambda w: vars(w) if is_quantized(w) else w, params, is_leaf=is_quantized), tokens)

    return LanguageModel(init, logits)


def _linen(*sizes) -> LanguageModel:
    model = linen_model.Decoder(*sizes)

    def init(key):
        return nn.unbox(_trained_collection(model.init(key, jnp.zeros((1, 1), "int32"))))

    def logits(params, tokens) -> Any:  # modules look up their own names in each collection, and ignore other names
        return model.apply({"params": params, "lora": params}, tokens)

    return LanguageModel(init, logits)


def _trained_kind(config: gemma_mlp.MLPConfig) -> Any:
    return nnx.Param if config.lora is None else nnx.LoRAParam


def _trained_collection(variables: Any) -> Any:
    return variables.get("lora", variables["params"])
