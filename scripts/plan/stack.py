"""The program that is planned: the MLP blocks of all layers under scan, forward or a training step with AdamW."""

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
from gemma_mlp.params import LeafSpec

PROGRAMS = ("train", "forward")

LAYERS = {
    # Gemma 1 report (arXiv:2403.08295), table 1.
    "gemma1_2b": 18, "gemma1_7b": 28,
    # Gemma 2 report (arXiv:2408.00118), table 1.
    "gemma2_2b": 26, "gemma2_9b": 42, "gemma2_27b": 46,
    # Gemma 3: `num_hidden_layers` of the released text configs.
    "gemma3_270m": 18, "gemma3_1b": 26, "gemma3_4b": 34, "gemma3_12b": 48, "gemma3_27b": 62,
}  # fmt: skip


class Saved(NamedTuple):
    """What a layer keeps for the backward pass beside its input, and the products of a training step for it."""

    save: Any  # of the MLP's own backward pass
    names: tuple[str, ...]  # the tags that jax.checkpoint keeps around the block
    products: int


# Leanest first. The forward pass has three products, the backward pass six; gate and up again are two, y another.
SAVES = {
    "block": Saved("input", (), 3 + 6 + 5),
    "input": Saved("input", ("mlp_out",), 3 + 6 + 2),
    "gate_up": Saved("gate_up", ("mlp_out", "mlp_gate", "mlp_up"), 3 + 6),
}
FORWARD_PRODUCTS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to plan.

    Attributes:
      preset: of `gemma_mlp.PRESETS`.
      program: `train` or `forward`.
      mesh: sizes of data, fsdp and tensor.
      tokens: of the one sequence that each row of devices along data and fsdp has.
      save: of SAVES.
      sequence_parallel: whether tensor splits the length outside of the feed-forward.
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
        """Of the products, on each chip: 2 D F for each product of each token; norms and the optimizer are left out."""
        products = SAVES[self.save].products if self.program == "train" else FORWARD_PRODUCTS
        weight = self.config.embed_dim * self.config.hidden_dim
        return 2 * weight * products * LAYERS[self.preset] * self.tokens // self.mesh[2]

    def __str__(self):
        mesh = ",".join(f"{axis}={size}" for axis, size in zip(meshes.AXES, self.mesh))
        return f"mesh={mesh} sequence_parallel={self.sequence_parallel} save={self.save}"


def build(case: Case, mesh: Mesh) -> tuple[Callable, tuple[Any, ...], tuple[int, ...]]:
    """The function, its abstract arguments with their shardings, and which of them it is given for good.

    Raises:
      ValueError: if the mesh does not divide the sizes.
    """
    config = case.config
    stacked = jax.tree.map(
        lambda spec: LeafSpec((LAYERS[case.preset], *spec.shape), ("layers", *spec.axes), spec.init),
        MLPBlockParams.specs(config),
        is_leaf=lambda leaf: isinstance(leaf, LeafSpec),
    )
    shardings = sharding.named_shardings(stacked, mesh, (*case.rules, ("layers", None)))
    params: Any = jax.tree.map(
        lambda spec, place: jax.ShapeDtypeStruct(spec.shape, config.param_dtype, sharding=place),
        stacked,
        shardings,
        is_leaf=lambda leaf: isinstance(leaf, LeafSpec),
    )
    shape = (case.all_tokens // case.tokens, case.tokens, config.embed_dim)
    x = jax.ShapeDtypeStruct(shape, config.dtype, sharding=sharding.activation_sharding(shape, mesh, case.rules))
    if case.program == "forward":
        return _forward(case), (params, x), ()
    optimizer = optax.adamw(1e-4)  # the rate costs nothing
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
        sharding.optimizer_shardings(optimizer, params, shardings, mesh),
    )
    return _step(case, optimizer), (params, state, x), (0, 1)


def _forward(case):
    policy = jax.checkpoint_policies.save_only_these_names(*SAVES[case.save].names)

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)  # scan keeps the two passes apart
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
