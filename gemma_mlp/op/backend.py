"""What a feed-forward is traced with: the options of one call, and the kernels of the backend that computes it.

To add a backend: a file with a value of `Backend`, whose functions get whole arrays and run kernels by
`run_kernel`; its name in choose.py's `KERNELS` and error text, which tests/op/test_tpu.py matches (the other
refusals there hold for all); its floor in tests/test_house.py; its tests in tests/op; the tables and what kernels
serve in this folder's README, and `implementation` in the main README.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gemma_mlp.activations import Activation
from gemma_mlp.config import MLPConfig
from gemma_mlp.dtypes import accumulation_dtype
from gemma_mlp.mesh import run_on_mesh


class Backend(NamedTuple):
    """Kernels that replace XLA's arithmetic. Where a field is None, :mod:`gemma_mlp.op.xla` does the work.

    Code asks for a capability, never for a backend's name. x and dy are [*B, D]; gate, up and h are [*B, F]. Results
    are in `op.dtype` unless said otherwise. "Saved" gate and up are those of `save="gate_up"`.

    Attributes:
      forward: (op, params, x, save_gate_up) -> (y,), or (y, gate, up) if gate and up are saved.
      hidden: (op, params, x, save_gate_up) -> (h,), or (h, gate, up) if gate and up are saved, which it is only asked
        for if there is no `forward`.
      backward: (op, params, x, dy) -> (gradients of params in their dtypes, gradient of x in float32), from x alone.
      hidden_backward: (op, params, dy, gate, up) -> (h, dgate, dup), from saved gate and up.
      weight_backward: (op, params, dy, gate, up) -> (dgate, dup, gradient of down_proj), from saved gate and up, which
        it overwrites. It takes all of F at once.
      float32_slices: if nothing is saved, XLA's backward pass goes through F in up to this many slices, in which gate,
        up and dh are float32. That is as accurate as a kernel, and takes less memory than whole arrays in bfloat16.
        None: it takes F at once, as XLA's own backward pass does.
      lacks: activations that its kernels cannot compute.
    """

    forward: Callable | None = None
    hidden: Callable | None = None
    backward: Callable | None = None
    hidden_backward: Callable | None = None
    weight_backward: Callable | None = None
    float32_slices: int | None = None
    lacks: tuple[Activation, ...] = ()


XLA = Backend()


class Op(NamedTuple):
    """What is known of one call when it is traced."""

    config: MLPConfig  # the checked options
    dtype: Any  # the compute dtype
    dropout_rate: float = 0.0  # 0 where dropout is off
    backend: Backend = XLA  # whose kernels run
    # True inside the branch for a CPU, False elsewhere, also where CPUs have no branch of their own. None with
    # `save="autodiff"`: there each matmul finds out when the program is lowered.
    on_cpu: bool | None = False
    round_between: bool = True  # whether gate, up and dh are rounded to `dtype` where they are stored between matmuls
    in_slices: bool = False  # whether the weights are slices along F already

    @property
    def wide(self) -> jnp.dtype:
        """The dtype of sums and of element-wise work."""
        return accumulation_dtype(self.dtype)

    @property
    def between(self) -> jnp.dtype:
        """The dtype in which a matmul is stored if element-wise work follows."""
        return self.dtype if self.round_between else self.wide


def run_kernel(
    op: Op, kernel: Callable, arguments: Sequence[tuple[str, Array]], results: Sequence[str], **options: Any
) -> list[Array]:
    """kernel(*arrays, activation=..., **options) on each device's shard, as :func:`gemma_mlp.mesh.run_on_mesh` has it.

    It raises a ValueError if the results are differentiated. The feed-forward's own gradient does not do that.
    """

    @jax.custom_jvp
    def run(*arrays):
        with jax.enable_x64(False):  # Mosaic has no 64-bit integers
            return kernel(*arrays, activation=op.config.activation, **options)

    run.defjvp(_refuse)
    return run_on_mesh(run, arguments, results, op.config.axis_rules)


def _refuse(*_) -> NoReturn:
    raise ValueError(
        "With implementation='pallas' a gradient must not be differentiated again. Got: a derivative of a gradient. "
        "Fix: use implementation='xla'."
    )
