"""Where each parameter of each layer lies among the tensors of a tree or a checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_mlp.checks import describe, require
from gemma_mlp.dtypes import DTYPES
from gemma_mlp.layouts.arrays import add_exactly, apply, transpose
from gemma_mlp.layouts.layout import Layout
from gemma_mlp.params import LEAVES


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one leaf of one layer is stored.

    Attributes:
      tensor: the name of the tensor that holds it.
      at: one entry for each axis of the tensor: an index for the axes L and 2, the letter itself for D and F.
      leaf: its name in `LEAVES`.
      layout: of the tensor.
      plus_one: whether the tensor holds 1 + w.
    """

    tensor: str
    at: tuple[int | str, ...]
    leaf: str
    layout: Layout
    plus_one: bool

    def read(self, tensor: Any, index: tuple[slice, ...] | None = None) -> Any:
        """The leaf, or the part of it that `index` selects. `tensor` is anything that can be indexed."""
        axes = LEAVES[self.leaf]
        slices = dict(zip(axes, index or (slice(None),) * len(axes)))
        stored_index = tuple(slices[at] if isinstance(at, str) else at for at in self.at)
        part = apply(lambda tensor: tensor[stored_index], tensor)
        part = transpose(part, "".join(at for at in self.at if isinstance(at, str)), axes)
        return add_exactly(part, -1, self.tensor, self.layout.round_norms) if self.plus_one else part


def count_layers(layout: Layout, tensors: Mapping[str, Any]) -> int:
    """The number of layers, at least 1. Stacked layers are counted by a shape, others by the tensors' names."""
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
    """The slot of every leaf of every layer. First it checks all names, shapes and dtypes.

    Args:
      layout: of `tensors`.
      tensors: anything with a shape and a dtype, by name. Tensors of layers that are not wanted may be None.
      num_layers: of the model.
      layers: the layers that are wanted; None: all.
      where: gives the file of a tensor, for errors.

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
        require(str(tensors[name].dtype) in DTYPES, rule, received, fix)
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
        {leaf: slot for stored in layout.stored for leaf, slot in _slots(layout, stored, layer, tensors, num_layers)}
        for layer in layers
    ]


def _slots(layout, stored, layer, tensors, num_layers):
    """The leaves that `stored` holds for a layer, and their slots."""
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
        yield leaf, Slot(name, tuple(index.get(axis, axis) for axis in fitting[0]), leaf, layout, stored.plus_one)
