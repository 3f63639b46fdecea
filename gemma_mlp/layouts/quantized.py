"""Quantised tensors in a library's tree: the integers and the scales of one weight, or of several in one tensor.

| who | names in place of that of the tensor X | value |
|---|---|---|
| this package, qwix | `X/qvalue`, `X/scale` | qvalue * scale |
| DeepMind's `gm.nn.IntWrapper` | `_IntEinsum_X/kernel`, `_IntEinsum_X/scale` | kernel / scale |
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gemma_mlp.checks import require
from gemma_mlp.dtypes import accumulation_dtype
from gemma_mlp.layouts.arrays import evaluate
from gemma_mlp.weights import QuantizedWeight, require_sound

VALUES = re.compile(r"(?P<ours>.*)/qvalue|(?P<module>(?:.*/)?)_IntEinsum_(?P<theirs>[^/]+)/kernel")


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A tensor of a tree. It is indexed and transposed as an array of its numbers would be, which its slots do.

    Attributes:
      name: the dense tensor's name, for errors.
      qvalue: its integers or float8 numbers.
      scale: has as many axes as qvalue; any of them may have size 1.
      reciprocal: True: the numbers are qvalue / scale. False: qvalue * scale.
    """

    name: str
    qvalue: Any
    scale: Any
    reciprocal: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.qvalue.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def __getitem__(self, index: tuple[Any, ...]) -> "QuantizedTensor":
        require(
            len(self.scale.shape) == len(self.shape),
            f"The scale of {self.name} must have as many axes as the numbers.",
            f"scale {list(self.scale.shape)}, numbers {list(self.shape)}",
            "give one row of scales for each group along the contracted axis, or one row in all.",
        )
        sizes = zip(index, self.scale.shape)
        of_scale = tuple(0 if size == 1 and not isinstance(at, slice) else at for at, size in sizes)
        qvalue = evaluate(lambda array: array[index], self.qvalue)
        return dataclasses.replace(self, qvalue=qvalue, scale=evaluate(lambda array: array[of_scale], self.scale))

    def transpose(self, order: tuple[int, ...]) -> "QuantizedTensor":
        qvalue, scale = (evaluate(lambda array: array.transpose(order), array) for array in (self.qvalue, self.scale))
        return dataclasses.replace(self, qvalue=qvalue, scale=scale)

    def weight(self) -> QuantizedWeight:
        """A weight of ours. The reciprocal of a scale is rounded to float32, or to float64 if the scale is that.

        Raises:
          ValueError: if there is not one scale for each group along the contracted axis and each output channel.
        """
        scale = self.scale
        if self.reciprocal:
            wide = accumulation_dtype(scale.dtype)
            with np.errstate(divide="ignore"):  # 1 / 0 is an infinity, which readers refuse
                scale = evaluate(lambda array: 1 / array.astype(wide), scale)
        weight = QuantizedWeight(self.qvalue, scale)
        require_sound(self.name, weight)
        return weight


def joined(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` with one :class:`QuantizedTensor` in place of the two parts of each, under the dense tensor's name."""
    result = dict(tensors)
    for name in tensors:
        found = VALUES.fullmatch(name)
        if found:
            dense = found["ours"] or found["module"] + found["theirs"]
            scale = name.removesuffix("qvalue").removesuffix("kernel") + "scale"
            if scale in tensors:
                parts = result.pop(name), result.pop(scale)
                result[dense] = QuantizedTensor(dense, *parts, reciprocal=found["ours"] is None)
    return result


def as_weight(leaf: Any) -> Any:
    """`leaf`, or the weight if it is a :class:`QuantizedTensor`."""
    return leaf.weight() if isinstance(leaf, QuantizedTensor) else leaf


def shape_of(tensor: Any) -> Any:
    """The `jax.ShapeDtypeStruct` of a tensor, or a QuantizedTensor of two."""
    if isinstance(tensor, QuantizedTensor):
        return dataclasses.replace(tensor, qvalue=shape_of(tensor.qvalue), scale=shape_of(tensor.scale))
    return jax.ShapeDtypeStruct(tuple(tensor.shape), tensor.dtype)
