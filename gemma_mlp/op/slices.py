"""Loops over chunks of tokens and slices of F, on arrays that a mesh may split.

`vjp._forward` loops over chunks of tokens with these; `xla.gradients` loops over slices of F, and `xla._slice_size`
says how large they are.
"""

from typing import Any, NamedTuple

from jax import lax

LANES = 128  # the width of a TPU's vector registers: slices and blocks of F are multiples of it


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(number: int, multiple: int) -> int:
    return ceil_div(number, multiple) * multiple


def in_slices(total: int, size: int, body, carry):
    """carry = body(start, size, carry) for every slice of an axis of length `total`; the last may be shorter."""
    whole, rest = divmod(total, size)
    carry = lax.fori_loop(0, whole, lambda i, carry: body(i * size, size, carry), carry)
    return body(whole * size, rest, carry) if rest else carry


class SlicedAxis(NamedTuple):
    """Slices an axis that is sharded over `shards` devices.

    Each slice takes the same range from every shard, so no data moves between devices.
    """

    axis: int
    shards: int

    def take(self, array, start, size) -> Any:
        """The slice of `array` that begins at `start` of every shard; None for None."""
        if array is None:
            return None
        return self._join(lax.dynamic_slice_in_dim(self._split(array), start, size, self._axis_of_shard))

    def put(self, array, part, start) -> Any:
        """`array` with the slice that begins at `start` replaced by `part`; None for None."""
        if array is None:
            return None
        return self._join(
            lax.dynamic_update_slice_in_dim(self._split(array), self._split(part), start, self._axis_of_shard)
        )

    @property
    def _axis_of_shard(self):
        return self.axis if self.axis < 0 else self.axis + 1

    def _split(self, array):
        """The axis as two: shards, and what is in one shard."""
        axis = self.axis % array.ndim
        shard = array.shape[axis] // self.shards
        return array.reshape(*array.shape[:axis], self.shards, shard, *array.shape[axis + 1 :])

    def _join(self, array):
        axis = self._axis_of_shard % array.ndim
        return array.reshape(*array.shape[: axis - 1], self.shards * array.shape[axis], *array.shape[axis + 1 :])
