"""What a layout of the block's parameters is, and lossless conversions of trees from one and to one.

A layout is a table: the name of each stored tensor, the leaves of ours that it holds, and its axes. Axes are letters:
D and F as everywhere, 2 for gate and up, L for stacked layers. Everything else follows from the letters.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_mlp.checks import describe, require
from gemma_mlp.config import MLPConfig
from gemma_mlp.dtypes import DTYPES, accumulation_dtype
from gemma_mlp.params import BIASES, LEAVES, MLPBlockParams, MLPParams, RMSNormParams


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a layer.

    Attributes:
      name: within the layer, the layout's separator between its parts.
      leaves: what it holds; a pair where its axes have a 2.
      axes: in order, as "FD"; several if the layout knows several and the shape has to decide.
      plus_one: whether 1 + w is stored in place of a norm's w, always in float32 (or float64).
    """

    name: str
    leaves: tuple[str, ...]
    axes: tuple[str, ...]
    plus_one: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a library keeps the block's parameters; made by the functions below.

    Attributes:
      config: the block's sizes, and whether it has a post-norm. Layouts have no biases; Gemma has none.
      layer: the name of a layer, with {layer}, {entry} or {group} where its number goes.
      stored: the tensors of a layer.
      modules: the parts of a layer that belong to this block alone; any other tensor in them is an error.
      separator: between the parts of a name.
      keys: the dictionary keys that lead to a tensor, from its name.
      groups: layer i is entry i // len(groups) of group groups[i % len(groups)].
      round_norms: whether a norm that 1 + w cannot hold exactly is rounded; otherwise it is refused.
    """

    config: MLPConfig
    layer: str
    stored: tuple[Stored, ...]
    modules: tuple[str, ...]
    separator: str = "/"
    keys: Callable[[str], tuple[Any, ...]] = lambda name: tuple(name.split("/"))
    groups: tuple[str, ...] = ("",)
    round_norms: bool = False

    def __post_init__(self):
        require(
            not self.config.use_bias,
            "A layout holds Gemma's parameters, which have no biases.",
            "use_bias=True",
            "save such parameters as they are.",
        )
        held = tuple(stored for stored in self.stored if self.config.post_norm or stored.leaves != ("post_norm",))
        object.__setattr__(self, "stored", held)
        leaves = [leaf for stored in held for leaf in stored.leaves]
        require(
            sorted(leaves) == sorted(self.leaves),
            f"The layout has a place for {', '.join(self.leaves)}.",
            f"places for {', '.join(leaves)}",
            "choose a layout of the same model family.",
        )

    @property
    def leaves(self) -> dict[str, str]:
        """The leaves of a layer, and their axes."""
        left_out = BIASES if self.config.post_norm else (*BIASES, "post_norm")
        return {leaf: axes for leaf, axes in LEAVES.items() if leaf not in left_out}

    @property
    def stacks(self) -> bool:
        """Whether layers are stacked into one tensor."""
        return "L" in self.stored[0].axes[0]

    def name(self, stored: Stored, layer: int) -> str:
        """The name of the tensor that holds `stored` for a layer."""
        return self.separator.join((self.layer, stored.name)).format(**self._numbers(layer))

    def shape(self, axes: str, layer: int, num_layers: int) -> tuple[int, ...]:
        """What the axes come to, in the tensor of a layer, in a model of so many."""
        entries = len(range(layer % len(self.groups), num_layers, len(self.groups)))
        sizes = {"D": self.config.embed_dim, "F": self.config.hidden_dim, "2": 2, "L": entries}
        return tuple(sizes[axis] for axis in axes)

    def pattern(self) -> re.Pattern:
        """Matches the name of any tensor in the block's modules; the group `number` is the layer's."""
        layer = re.sub(r"\\{(layer|entry)\\}", r"(?P<number>\\d+)", re.escape(self.layer)).replace(r"\{group\}", ".*?")
        modules = "|".join(re.escape(module).replace(r"\{group\}", ".*?") for module in self.modules)
        return re.compile(f"{layer}{re.escape(self.separator)}({modules})({re.escape(self.separator)}.*)?")

    def _numbers(self, layer: int) -> dict[str, Any]:
        entry, group = divmod(layer, len(self.groups))
        return {"layer": layer, "entry": entry, "group": self.groups[group]}


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one leaf of one layer lies: at `at` of `tensor`, which has an index for its axes L and 2, else letters."""

    tensor: str
    at: tuple[int | str, ...]
    leaf: str
    layout: Layout
    plus_one: bool

    def read(self, tensor: Any, index: tuple[slice, ...] | None = None) -> Any:
        """The leaf, or the part of it that `index` says, out of anything that can be indexed."""
        axes = LEAVES[self.leaf]
        slices = dict(zip(axes, index or (slice(None),) * len(axes)))
        part = _apply(lambda tensor: tensor[tuple(slices[at] if isinstance(at, str) else at for at in self.at)], tensor)
        part = _transpose(part, "".join(at for at in self.at if isinstance(at, str)), axes)
        return _shift(part, -1, self.tensor, self.layout) if self.plus_one else part


def from_tree(tree: Any, layout: Layout) -> list[MLPBlockParams]:
    """The parameters of every layer, from a library's tree.

    Bit for bit, in the dtypes of the tree; norms stored as 1 + w come as float32. Of Linen pass `nn.unbox(params)`,
    of NNX `nnx.to_pure_dict(nnx.state(model, nnx.Param))`.

    Args:
      tree: nested mappings and lists of NumPy or JAX arrays, or of `jax.ShapeDtypeStruct`s, which give the same. What
        is not this block's may be there too.
      layout: whose tree it is.

    Raises:
      ValueError: if a tensor is missing, one too many, misshapen or of a dtype that is not supported; if the shapes
        do not decide its orientation; if w cannot be had exactly from 1 + w.
    """
    tensors = flatten(tree, layout.separator)
    slots = locate(layout, tensors, count_layers(layout, tensors))
    return [make_params({leaf: slot.read(tensors[slot.tensor]) for leaf, slot in layer.items()}) for layer in slots]


def to_tree(layers: Sequence[MLPBlockParams], layout: Layout) -> dict[Any, Any]:
    """A library's tree of the parameters of every layer: the inverse of :func:`from_tree`.

    Raises:
      ValueError: if the parameters do not have the shapes that `layout.config` says; if the layout has several
        orientations and none was chosen; if 1 + w cannot hold w.
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
    """The tensors of a layout by name, each made when it is called for; errors are those of :func:`to_tree`."""
    leaves = {number: block_leaves(params) for number, params in layers.items()}
    expected = {leaf: layout.shape(axes, 0, 1) for leaf, axes in layout.leaves.items()}
    for number, layer in leaves.items():
        require(
            {leaf: tuple(array.shape) for leaf, array in layer.items()} == expected,
            f"Every layer has the shapes that the config says, {expected}.",
            f"{', '.join(f'{leaf} {describe(array)}' for leaf, array in layer.items())} in layer {number}",
            "check the config; unstack() makes a list of stacked layers.",
        )
    for stored in layout.stored:
        require(
            len(stored.axes) == 1,
            f"{stored.name} is stored in one of {len(stored.axes)} orientations.",
            "none",
            "choose one where the layout is made.",
        )
    held: dict[str, tuple[Stored, list[Mapping[str, Any]]]] = {}
    for number, layer in sorted(leaves.items()):
        for stored in layout.stored:
            held.setdefault(layout.name(stored, number), (stored, []))[1].append(layer)
    return {name: functools.partial(_assemble, layers, stored, layout, name) for name, (stored, layers) in held.items()}


def stack(layers: Sequence[MLPBlockParams]) -> MLPBlockParams:
    """Layers on a new leading axis, for scan."""
    return jax.tree.map(lambda *leaves: _apply(_stack, *leaves), *layers)


def unstack(params: MLPBlockParams) -> list[MLPBlockParams]:
    """The inverse of :func:`stack`."""
    count = params.pre_norm.scale.shape[0]
    return [jax.tree.map(lambda leaf, i=i: _apply(lambda leaf: leaf[i], leaf), params) for i in range(count)]


def block_leaves(params: MLPBlockParams) -> dict[str, Any]:
    """The leaves of a layer by the names of `LEAVES`, biases by their own."""
    norms = {name: norm.scale for name in ("pre_norm", "post_norm") if (norm := getattr(params, name)) is not None}
    return norms | {name: leaf for name, leaf in vars(params.mlp).items() if leaf is not None}


def make_params(leaves: Mapping[str, Any]) -> MLPBlockParams:
    """The inverse of :func:`block_leaves`."""
    norms = {name: RMSNormParams(leaves[name]) for name in ("pre_norm", "post_norm") if name in leaves}
    return MLPBlockParams(mlp=MLPParams(**{name: leaves[name] for name in leaves if name not in norms}), **norms)


def flatten(tree: Any, separator: str) -> dict[str, Any]:
    """Every array of nested mappings and lists, by the keys that lead to it, joined.

    Raises:
      ValueError: if two have one name.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=separator) for path, _ in leaves]
    twice = [name for name, count in Counter(names).items() if count > 1]
    require(
        not twice, "Every tensor has a name of its own.", ", ".join(twice[:3]), "pass one form of the tree, not two."
    )
    return {name: leaf for name, (_, leaf) in zip(names, leaves)}


def count_layers(layout: Layout, tensors: Mapping[str, Any]) -> int:
    """How many layers `tensors` are of, by their names or, where layers are stacked, by a shape; at least 1."""
    if layout.stacks:
        stored = layout.stored[0]
        names = [layout.name(stored, layer) for layer in range(len(layout.groups))]
        shapes = [getattr(tensors.get(name), "shape", ()) for name in names]
        return max(1, sum(dict(zip(stored.axes[0], shape)).get("L", 0) for shape in shapes))
    pattern = layout.pattern()
    numbers = [int(match["number"]) for name in tensors if (match := pattern.fullmatch(name))]
    return (1 + max(numbers, default=0)) * len(layout.groups)


def locate(
    layout: Layout,
    tensors: Mapping[str, Any],
    num_layers: int,
    layers: Sequence[int] | None = None,
    where: Callable[[str], str] = lambda name: "the tree",
) -> list[dict[str, Slot]]:
    """Where every leaf of every layer lies, once all that names, shapes and dtypes can tell is known to be right.

    Args:
      layout: of `tensors`.
      tensors: by name; anything with a shape and a dtype.
      num_layers: of the model.
      layers: those wanted; None: all.
      where: the file of a tensor, for messages.

    Raises:
      ValueError: naming the tensor, where it is, what was expected and what came.
    """
    layers = range(num_layers) if layers is None else layers
    wanted = {layout.name(stored, layer): (stored, layer) for layer in layers for stored in layout.stored}
    for name, (stored, layer) in wanted.items():
        expected = [list(layout.shape(axes, layer, num_layers)) for axes in stored.axes]
        rule = f"{name} in {where(name)} is {' or '.join(map(str, expected))} of {', '.join(DTYPES)}."
        require(
            name in tensors, rule, f"no such tensor; {_sample(tensors)}", "check the layout, its prefix and the file."
        )
        received = describe(tensors[name])
        require(
            list(getattr(tensors[name], "shape", ())) in expected,
            rule,
            received,
            "check embed_dim, hidden_dim and the layout, which says what is transposed.",
        )
        require(
            str(tensors[name].dtype) in DTYPES, rule, received, "convert it first; float16 and integers are refused."
        )
    _require_no_surplus(layout, tensors, num_layers, where)
    return [
        {leaf: slot for stored in layout.stored for leaf, slot in _slots(layout, stored, layer, tensors, num_layers)}
        for layer in layers
    ]


def _require_no_surplus(layout, tensors, num_layers, where) -> None:
    known = {layout.name(stored, layer) for layer in range(num_layers) for stored in layout.stored}
    pattern = layout.pattern()
    for name in tensors:
        require(
            name in known or not pattern.fullmatch(name),
            f"The block's modules hold {', '.join(stored.name for stored in layout.stored)}, in {num_layers} layers.",
            f"{name} in {where(name)}",
            "it is of another model, or quantised, or adapted; give the config and the layout that it belongs to.",
        )


def _slots(layout, stored, layer, tensors, num_layers):
    name = layout.name(stored, layer)
    fitting = [axes for axes in stored.axes if layout.shape(axes, layer, num_layers) == tuple(tensors[name].shape)]
    require(
        len(fitting) == 1,
        f"The shape of {name} decides its orientation.",
        f"{describe(tensors[name])}, which may be {' or '.join(fitting)}",
        "D = F: say which it is where the layout is made.",
    )
    for place, leaf in enumerate(stored.leaves):
        index = {"L": layer // len(layout.groups), "2": place}
        yield leaf, Slot(name, tuple(index.get(axis, axis) for axis in fitting[0]), leaf, layout, stored.plus_one)


def _assemble(layers: Sequence[Mapping[str, Any]], stored: Stored, layout: Layout, name: str) -> Any:
    """The tensor that holds `stored` of these layers: of one, or of a stack."""
    (axes,) = stored.axes
    held = [
        [_shift(layer[leaf], 1, name, layout) if stored.plus_one else layer[leaf] for leaf in stored.leaves]
        for layer in layers
    ]
    pairs = [_apply(_stack, *leaves) if "2" in axes else leaves[0] for leaves in held]
    whole = _apply(_stack, *pairs) if "L" in axes else pairs[0]
    return _transpose(whole, "".join(axis for axis in "L2" if axis in axes) + LEAVES[stored.leaves[0]], axes)


def _shift(array: Any, by: int, name: str, layout: Layout) -> Any:
    """array + by, in float32 or wider, if by can be taken off again exactly."""
    wide = accumulation_dtype(array.dtype)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, wide)
    array = array.astype(wide)
    shifted = array + array.dtype.type(by)
    lost = 0 if layout.round_norms else int((shifted - array.dtype.type(by) != array).sum())
    require(
        lost == 0,
        f"{name} stores 1 + w, from which w can be had back exactly.",
        f"{lost} of {array.size} numbers that {wide} rounds",
        "round_norms=True keeps the factor 1 + w as float32 rounds it, which is what the block multiplies by.",
    )
    return shifted


def _transpose(array: Any, axes: str, to: str) -> Any:
    order = tuple(axes.index(axis) for axis in to)
    return array if axes == to else _apply(lambda array: array.transpose(order), array)


def _stack(*arrays: Any) -> Any:
    return (jnp if any(isinstance(array, jax.Array) for array in arrays) else np).stack(arrays)


def _apply(function: Callable, *arrays: Any) -> Any:
    """`function` of arrays, or what it would give of shapes."""
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
        return jax.eval_shape(function, *arrays)
    return function(*arrays)


def _sample(tensors: Mapping[str, Any]) -> str:
    names = list(tensors)
    return f"{len(names)} tensors" + (f", such as {', '.join(names[:3])}" if names else "")
