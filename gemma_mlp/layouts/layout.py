"""What a layout is, and where it places each leaf of each layer.

A layout is a table of the tensors in which a library stores one layer. Each row of it, a `Stored`, gives a tensor's
name, the leaves of ours that it holds, and its axes as letters. D and F are the sizes of the block, 2 is the axis that
joins gate and up, and L is the axis of stacked layers. A `Slot` is the place of one leaf of one layer.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gemma_mlp.checks import describe, require
from gemma_mlp.config import MLPConfig
from gemma_mlp.dtypes import DTYPES
from gemma_mlp.layouts.arrays import add_exactly, evaluate, transpose
from gemma_mlp.params import BIASES, LEAVES


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a layer.

    Attributes:
      name: of the tensor, within its layer.
      leaves: the leaves of ours that it holds. If its axes have a 2, there are two: index 0 is the first of them.
      axes: letters in the order of the tensor's axes, such as "FD". If a library has several orders, each is given,
        and the tensor's shape decides.
      factor: whether the tensor holds what a norm multiplies by, instead of w. If the config says `scale_plus_one`,
        that is 1 + w, which we write in float32, or in float64 if w is. Else it is w itself, so nothing changes.
    """

    name: str
    leaves: tuple[str, ...]
    axes: tuple[str, ...]
    factor: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a library stores the block's parameters. The functions of `gemma_mlp.layouts` make layouts.

    Attributes:
      config: the block's sizes, and whether it has a post-norm. It must not ask for biases: Gemma has none.
      layer: the name of a layer. {layer} stands for its number, {group} for the name of its group, {entry} for its
        position within the group.
      stored: the tensors of a layer.
      modules: submodules of a layer that hold only this block's tensors. Any other tensor in them is an error.
      separator: stands between the parts of a name.
      keys: turns a tensor's full name into the dictionary keys that lead to it.
      groups: layers are dealt to groups in turn (Gemma 2: local, global, local, ...). Layer i is entry i // n of group
        i % n, where n is the number of groups.
      round_norms: True: round a norm whose w cannot be recovered from 1 + w. False: refuse it.
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
            "use_bias must be False: a layout holds Gemma's parameters, and Gemma has no biases.",
            "use_bias=True",
            "save such parameters with Orbax, as they are.",
        )
        # Layouts list a post-norm; a model without one does not store it.
        stored = tuple(stored for stored in self.stored if self.config.post_norm or stored.leaves != ("post_norm",))
        object.__setattr__(self, "stored", stored)
        leaves = [leaf for tensor in stored for leaf in tensor.leaves]
        require(
            sorted(leaves) == sorted(self.leaf_shapes),
            f"The layout must have a place for {', '.join(self.leaf_shapes)}.",
            f"places for {', '.join(leaves)}",
            "choose a layout of the same model family.",
        )

    @property
    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """The leaves of a layer and their shapes."""
        left_out = BIASES if self.config.post_norm else (*BIASES, "post_norm")
        return {leaf: self.shape(axes, 0, 1) for leaf, axes in LEAVES.items() if leaf not in left_out}

    def adds_one(self, stored: Stored) -> bool:
        """Whether `stored` holds 1 + w."""
        return stored.factor and self.config.scale_plus_one

    def name(self, stored: Stored, layer: int) -> str:
        """The full name of the tensor that holds `stored` for layer number `layer`."""
        entry, group = divmod(layer, len(self.groups))
        name = self.separator.join((self.layer, stored.name))
        return name.format(layer=layer, entry=entry, group=self.groups[group])

    def shape(self, axes: str, layer: int, num_layers: int) -> tuple[int, ...]:
        """The sizes of `axes` in the tensor that holds layer number `layer` of a model with `num_layers` layers."""
        entries = len(range(layer % len(self.groups), num_layers, len(self.groups)))
        sizes = {"D": self.config.embed_dim, "F": self.config.hidden_dim, "2": 2, "L": entries}
        return tuple(sizes[axis] for axis in axes)

    def pattern(self) -> re.Pattern:
        """Matches the name of any tensor in the block's modules. match["number"] is the {layer} or the {entry}."""
        layer = re.sub(r"\\{(layer|entry)\\}", r"(?P<number>\\d+)", re.escape(self.layer)).replace(r"\{group\}", ".*?")
        modules = "|".join(re.escape(module).replace(r"\{group\}", ".*?") for module in self.modules)
        return re.compile(f"{layer}{re.escape(self.separator)}({modules})({re.escape(self.separator)}.*)?")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one leaf of one layer is stored."""

    tensor: str  # the name of the tensor that holds it
    at: tuple[int | str, ...]  # an entry for each of its axes: an index for L and 2, the letter itself for D and F
    leaf: str  # its name in `LEAVES`
    layout: Layout
    plus_one: bool  # whether the tensor holds 1 + w

    def read(self, tensor: Any, index: tuple[slice, ...] | None = None) -> Any:
        """The leaf, or the part of it that `index` selects. `tensor` is anything that can be indexed."""
        axes = LEAVES[self.leaf]
        slices = dict(zip(axes, index or (slice(None),) * len(axes)))
        stored_index = tuple(slices[at] if isinstance(at, str) else at for at in self.at)
        part = evaluate(lambda tensor: tensor[stored_index], tensor)
        part = transpose(part, "".join(at for at in self.at if isinstance(at, str)), axes)
        return add_exactly(part, -1, self.tensor, self.layout.round_norms) if self.plus_one else part


def count_layers(layout: Layout, tensors: Mapping[str, Any]) -> int:
    """The number of layers, at least 1. Stacked layers are counted by a shape, others by the tensors' names."""
    stored = layout.stored[0]
    if "L" in stored.axes[0]:
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
    where: Callable[[str], Any] = lambda name: "the tree",
    dtypes: Sequence[str] = DTYPES,
) -> list[dict[str, Slot]]:
    """The slot of every leaf of the `layers` that are wanted, by default of all.

    `tensors` holds, by name, anything with a shape and a dtype; tensors of other layers may be None. `where` gives the
    file of a tensor, for errors. `dtypes` are those that the tensors may have.

    Raises:
      ValueError: if a tensor is missing, superfluous, of a wrong shape or of a dtype that is not supported.
    """
    layers = range(num_layers) if layers is None else layers
    wanted = {layout.name(stored, layer): (stored, layer) for layer in layers for stored in layout.stored}
    for name, (stored, layer) in wanted.items():
        shapes = [list(layout.shape(axes, layer, num_layers)) for axes in stored.axes]
        rule = f"{name} in {where(name)} must be {' or '.join(map(str, shapes))} of {', '.join(DTYPES)}."
        missing = f"no such tensor; {len(tensors)} tensors, such as {list(tensors)[:3]}"
        require(name in tensors, rule, missing, "check the layout, its prefix and the file.")
        received = describe(tensors[name])
        fix = "check embed_dim, hidden_dim and the layout, which says what is transposed."
        require(list(getattr(tensors[name], "shape", ())) in shapes, rule, received, fix)
        fix = "convert it first; float16 and integers are refused."
        require(str(tensors[name].dtype) in dtypes, rule, received, fix)
    known = {layout.name(stored, layer) for layer in range(num_layers) for stored in layout.stored}
    pattern = layout.pattern()
    for name in tensors:
        require(
            name in known or not pattern.fullmatch(name),
            f"Modules must hold only {', '.join(stored.name for stored in layout.stored)}, in {num_layers} layers.",
            f"{name} in {where(name)}",
            "the checkpoint may be quantised, adapted or of another model: give the config and the layout that fit it.",
        )
    return [
        {slot.leaf: slot for stored in layout.stored for slot in _slots(layout, stored, layer, tensors, num_layers)}
        for layer in layers
    ]


def _slots(layout: Layout, stored: Stored, layer: int, tensors: Mapping[str, Any], num_layers: int) -> Iterator[Slot]:
    """Yields the slot of each leaf that `stored` holds for a layer."""
    name = layout.name(stored, layer)
    fitting = [axes for axes in stored.axes if layout.shape(axes, layer, num_layers) == tuple(tensors[name].shape)]
    require(
        len(fitting) == 1,
        f"The shape of {name} must decide its orientation.",
        f"{describe(tensors[name])}, which may be {' or '.join(fitting)}",
        "where D = F, choose the orientation when you make the layout.",
    )
    for place, leaf in enumerate(stored.leaves):
        index = {"L": layer // len(layout.groups), "2": place}
        yield Slot(name, tuple(index.get(axis, axis) for axis in fitting[0]), leaf, layout, layout.adds_one(stored))
