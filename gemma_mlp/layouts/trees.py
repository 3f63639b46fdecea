"""Lossless conversions between our parameters and the trees of other libraries."""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gemma_mlp.checks import describe, require
from gemma_mlp.layouts import arrays
from gemma_mlp.layouts.layout import Layout, Stored, count_layers, locate
from gemma_mlp.layouts.quantized import as_weight, joined
from gemma_mlp.params import LEAVES, MLPBlockParams, MLPParams, RMSNormParams, named_leaves
from gemma_mlp.weights import LoRAWeight, QuantizedWeight


def from_tree(tree: Any, layout: Layout) -> list[MLPBlockParams]:
    """The parameters of every layer, from a library's tree.

    The numbers keep their bits and their dtypes, except that a norm stored as 1 + w comes as w in float32, or in
    float64 if it is stored so.

    Args:
      tree: nested mappings and lists of NumPy or JAX arrays. It may hold other parameters too, and weights that are
        quantised as quantized.py says. With `jax.ShapeDtypeStruct`s in place of arrays, the result has them too. For
        Linen, pass `nn.unbox(params)`; for NNX, `nnx.to_pure_dict(nnx.state(model, nnx.Param))`.
      layout: of the tree.

    Raises:
      ValueError: if a tensor is missing, superfluous, of a wrong shape or of a dtype that is not supported; if the
        shapes do not decide the orientation; if w does not come exactly from 1 + w.
    """
    tensors = joined(flatten(tree, layout.separator))
    slots = locate(layout, tensors, count_layers(layout, tensors))

    def read(slot):
        return as_weight(slot.read(tensors[slot.tensor]))

    return [make_params({leaf: read(slot) for leaf, slot in layer.items()}) for layer in slots]


def to_tree(layers: Sequence[MLPBlockParams], layout: Layout) -> dict[Any, Any]:
    """A library's tree with the parameters of every layer: the inverse of :func:`from_tree`.

    Raises:
      ValueError: if the parameters do not have the shapes that `layout.config` says; if the layout has several
        orientations and none was chosen; if w does not survive in 1 + w; if weights have adapters, or are quantised and
        the layout is not :func:`gemma_mlp.layouts.gemma_mlp`.
    """
    tree: dict[Any, Any] = {}
    for name, make in stored_tensors(dict(enumerate(layers)), layout).items():
        *path, last = layout.keys(name)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = make()
    return tree


def stored_tensors(layers: Mapping[int, MLPBlockParams], layout: Layout) -> dict[str, Callable[[], Any]]:
    """For each tensor of the layout, a function that makes it. Its errors are those of :func:`to_tree`."""
    leaves = {number: block_leaves(params) for number, params in layers.items()}
    for number, layer in leaves.items():
        require(
            {leaf: tuple(array.shape) for leaf, array in layer.items()} == layout.leaf_shapes,
            f"Every layer must have the shapes that the config says, {layout.leaf_shapes}.",
            f"{', '.join(f'{leaf} {describe(array)}' for leaf, array in layer.items())} in layer {number}",
            "check the config; unstack() makes a list of stacked layers.",
        )
    for stored in layout.stored:
        require(
            len(stored.axes) == 1,
            f"The orientation of {stored.name} must be chosen before it is written.",
            f"a layout that allows {' and '.join(stored.axes)}",
            "choose one when you make the layout: transpose_gating_einsum=True or False.",
        )
        _require_kinds(stored, layout, leaves)
    held: dict[str, tuple[Stored, list[Mapping[str, Any]]]] = {}
    for number, layer in sorted(leaves.items()):
        for stored in layout.stored:
            held.setdefault(layout.name(stored, number), (stored, []))[1].append(layer)
    return {name: functools.partial(_assemble, layers, stored, layout, name) for name, (stored, layers) in held.items()}


def _require_kinds(stored: Stored, layout: Layout, leaves: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises ValueError if the layout cannot hold the weights because they are adapted or quantised."""
    for number, layer in leaves.items():
        for leaf in stored.leaves:
            name, weight = layout.name(stored, number), layer[leaf]
            require(
                not isinstance(weight, LoRAWeight),
                f"{name} must be a weight without an adapter.",
                "a weight with an adapter",
                "write adapters apart: extract_adapters() and gemma_mlp.remove_lora(). Or merge them: merge_lora().",
            )
            require(
                not isinstance(weight, QuantizedWeight) or stored.name == f"mlp/{leaf}",
                f"{name} must be a dense weight. Of all layouts, only gemma_mlp holds quantised ones.",
                "a quantised weight",
                "call gemma_mlp.dequantize() on the parameters, or choose the layout gemma_mlp.",
            )


def _assemble(layers: Sequence[Mapping[str, Any]], stored: Stored, layout: Layout, name: str) -> Any:
    """The tensor called `name`, which holds `stored` for one layer or for a stack of layers."""
    (axes,) = stored.axes

    def of_layer(layer):
        leaves = [layer[leaf] for leaf in stored.leaves]
        if layout.adds_one(stored):
            leaves = [arrays.add_exactly(leaf, 1, name, layout.round_norms) for leaf in leaves]
        return arrays.stack(*leaves) if "2" in axes else leaves[0]

    held = [of_layer(layer) for layer in layers]
    whole = jax.tree.map(arrays.stack, *held) if "L" in axes else held[0]
    return arrays.transpose(whole, "".join(axis for axis in "L2" if axis in axes) + LEAVES[stored.leaves[0]], axes)


def stack(layers: Sequence[MLPBlockParams]) -> MLPBlockParams:
    """The layers stacked on a new first axis, for `jax.lax.scan`."""
    return jax.tree.map(arrays.stack, *layers)


def unstack(params: MLPBlockParams) -> list[MLPBlockParams]:
    """The layers of a stack: the inverse of :func:`stack`."""
    count = params.pre_norm.scale.shape[0]
    return [jax.tree.map(functools.partial(arrays.evaluate, operator.itemgetter(i)), params) for i in range(count)]


def block_leaves(params: MLPBlockParams) -> dict[str, Any]:
    """The leaves of a layer by name: the inverse of :func:`make_params`. Biases are included."""
    norms = {name: norm.scale for name, norm in named_leaves(params).items() if name != "mlp"}
    return norms | named_leaves(params.mlp)


def make_params(leaves: Mapping[str, Any]) -> MLPBlockParams:
    """The parameters of a layer from its leaves by name: gate_proj, up_proj, down_proj, pre_norm, post_norm.

    The leaves may be arrays, shapes or shardings. Without post_norm, the block has none.
    """
    norms = {name: RMSNormParams(leaves[name]) for name in ("pre_norm", "post_norm") if name in leaves}
    return MLPBlockParams(mlp=MLPParams(**{name: leaves[name] for name in leaves if name not in norms}), **norms)


def flatten(tree: Any, separator: str = "/") -> dict[str, Any]:
    """The arrays of nested mappings and lists by name: the keys that lead to an array, joined by `separator`.

    Raises:
      ValueError: if two arrays have the same name.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=separator) for path, _ in leaves]
    twice = [name for name, count in Counter(names).items() if count > 1]
    rule, fix = "Every tensor must have a name of its own.", "pass one form of the tree, not two."
    require(not twice, rule, ", ".join(twice[:3]), fix)
    return {name: leaf for name, (_, leaf) in zip(names, leaves)}
