"""What a layout is: a table of the tensors in which a library stores the parameters of one layer.

Each row of the table gives a tensor's name, the leaves of ours that it holds, and its axes as letters. D and F are
the sizes of the block, 2 is the axis that joins gate and up, and L is the axis of stacked layers.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from gemma_mlp.checks import require
from gemma_mlp.config import MLPConfig
from gemma_mlp.params import BIASES, LEAVES


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a layer.

    Attributes:
      name: of the tensor, within its layer.
      leaves: the leaves of ours that it holds. If its axes have a 2, there are two: index 0 is the first of them.
      axes: letters in the order of the tensor's axes, such as "FD". If a library has several orders, each is given,
        and the tensor's shape decides.
      plus_one: whether a norm is stored as 1 + w instead of w. It is then in float32 or float64.
    """

    name: str
    leaves: tuple[str, ...]
    axes: tuple[str, ...]
    plus_one: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a library stores the block's parameters. The functions of `gemma_mlp.layouts` make layouts.

    Attributes:
      config: the block's sizes, and whether it has a post-norm. It must not ask for biases: Gemma has none.
      layer: the name of a layer. Its number goes where {layer}, {entry} or {group} is written.
      stored: the tensors of a layer.
      modules: submodules of a layer that hold only this block's tensors. Any other tensor in them is an error.
      separator: stands between the parts of a name.
      keys: turns a tensor's full name into the dictionary keys that lead to it.
      groups: layers are dealt to groups in turn (Gemma 2: local, global, local, ...). Layer i is entry i // n of group
        i % n, where n is the number of groups.
      round_norms: whether to round a norm whose w does not survive in 1 + w. Otherwise it is refused.
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
            sorted(leaves) == sorted(self.leaves),
            f"The layout must have a place for {', '.join(self.leaves)}.",
            f"places for {', '.join(leaves)}",
            "choose a layout of the same model family.",
        )

    @property
    def leaves(self) -> dict[str, str]:
        """The leaves of a layer and their axes."""
        left_out = BIASES if self.config.post_norm else (*BIASES, "post_norm")
        return {leaf: axes for leaf, axes in LEAVES.items() if leaf not in left_out}

    @property
    def stacks(self) -> bool:
        """Whether one tensor holds many layers."""
        return "L" in self.stored[0].axes[0]

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
        """Matches the name of any tensor in the block's modules. Its group `number` is the layer or the entry."""
        layer = re.sub(r"\\{(layer|entry)\\}", r"(?P<number>\\d+)", re.escape(self.layer)).replace(r"\{group\}", ".*?")
        modules = "|".join(re.escape(module).replace(r"\{group\}", ".*?") for module in self.modules)
        return re.compile(f"{layer}{re.escape(self.separator)}({modules})({re.escape(self.separator)}.*)?")
