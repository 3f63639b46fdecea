"""The program that is planned: the MLP blocks of all layers under scan, as a forward pass or as a training step.

The training step computes the gradient and applies AdamW. Parameters and moments are float32, matmuls bfloat16.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import meshes
import optax
from jax.sharding import Mesh

from gemma_mlp import PRESETS, MLPBlockParams, MLPConfig, mlp_block, sharding

PROGRAMS = ("train", "forward")

LAYERS = {
    # Gemma 1 report (arXiv:2403.08295), table 1.
    "gemma1_2b": 18, "gemma1_7b": 28,
    # Gemma 2 report (arXiv:2408.00118), table 1.
    "gemma2_2b": 26, "gemma2_9b": 42, "gemma2_27b": 46,
    # Gemma 3: `num_hidden_layers` in the released text configs.
    "gemma3_270m": 18, "gemma3_1b": 26, "gemma3_4b": 34, "gemma3_12b": 48, "gemma3_27b": 62,
}  # fmt: skip


class Saved(NamedTuple):
    """What each layer saves for the backward pass, in addition to its input."""

    save: Any  # the save policy of the MLP itself
    names: tuple[str, ...]  # the tags that jax.checkpoint saves around the block
    matmuls: int  # the number of matmuls of one layer in a training step


# The policy that saves least comes first. The forward pass has three matmuls and the backward pass six. Recomputing
# gate and up takes two more. Recomputing the MLP's output, which the norm after it needs, takes another three.
SAVES = {
    "block": Saved("input", (), 3 + 6 + 5),
    "input": Saved("input", ("mlp_out",), 3 + 6 + 2),
    "gate_up": Saved("gate_up", ("mlp_out", "mlp_gate", "mlp_up"), 3 + 6),
}
FORWARD_MATMULS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to plan.

    Attributes:
      preset: a name in `gemma_mlp.PRESETS`.
      program: `train` or `forward`.
      mesh: the sizes of the axes data, fsdp and tensor.
      tokens: the length of a sequence. A batch has data times fsdp sequences.
      save: a name in SAVES.
      sequence_parallel: whether the tensor axis shards the residual stream's length, outside of the feed-forward.
    """

    preset: str
    program: str
    mesh: tuple[int, int, int]
    tokens: int
    save: str
    sequence_parallel: bool

    @property
    def rules(self) -> sharding.Rules:
        return sharding.SEQUENCE_PARALLEL_RULES if self.sequence_parallel else sharding.RULES

    @property
    def config(self) -> MLPConfig:
        return dataclasses.replace(PRESETS[self.preset], save=SAVES[self.save].save, axis_rules=self.rules)

    @property
    def all_tokens(self) -> int:
        data, fsdp, _ = self.mesh
        return data * fsdp * self.tokens

    def flops(self) -> int:
        """FLOPs of the matmuls on each chip: 2 D F for each token and matmul. Norms and the optimizer do not count."""
        matmuls = SAVES[self.save].matmuls if self.program == "train" else FORWARD_MATMULS
        weight = self.config.embed_dim * self.config.hidden_dim
        return 2 * weight * matmuls * LAYERS[self.preset] * self.tokens // self.mesh[2]

    def __str__(self):
        mesh = ",".join(f"{axis}={size}" for axis, size in zip(meshes.AXES, self.mesh))
        return f"mesh={mesh} sequence_parallel={self.sequence_parallel} save={self.save}"


def build(case: Case, mesh: Mesh) -> tuple[Callable, tuple[Any, ...], tuple[int, ...]]:
    """Makes the program of a case.

    Returns:
      The function, its abstract arguments with their shardings, and the positions of the arguments to donate.

    Raises:
      ValueError: if the mesh does not divide the sizes.
    """
    config = case.config
    specs = MLPBlockParams.specs(config, LAYERS[case.preset])
    shardings = sharding.named_shardings(specs, mesh, case.rules)
    params = jax.tree.map(
        lambda place, spec: jax.ShapeDtypeStruct(spec.shape, config.param_dtype, sharding=place), shardings, specs
    )
    shape = (case.all_tokens // case.tokens, case.tokens, config.embed_dim)
    x = jax.ShapeDtypeStruct(shape, config.dtype, sharding=sharding.activation_sharding(shape, mesh, case.rules))
    if case.program == "forward":
        return _forward(case), (params, x), ()
    optimizer = optax.adamw(1e-4)  # the learning rate does not change the program's size
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
        sharding.optimizer_shardings(optimizer, params, shardings, mesh),
    )
    return _step(case, optimizer), (params, state, x), (0, 1)


def _forward(case):
    policy = jax.checkpoint_policies.save_only_these_names(*SAVES[case.save].names)

    @functools.partial(
        jax.checkpoint, policy=policy, prevent_cse=False
    )  # scan already keeps XLA from merging the passes
    def layer(x, params):
        return mlp_block(params, x, case.config), None

    return lambda params, x: jax.lax.scan(layer, x, params)[0]


def _step(case, optimizer):
    forward = _forward(case)

    def loss(params, x):
        return jnp.mean(jnp.square(forward(params, x).astype("float32")))

    def step(params, state, x):
        value, gradients = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step
