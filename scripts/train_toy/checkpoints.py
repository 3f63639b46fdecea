"""The checkpoints of a run: Orbax writes them, and any mesh can restore them."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from byte_decoder import language_model
from byte_decoder.language_model import LanguageModel
from byte_decoder.placement import RULES, Placement
from byte_decoder.training import TrainState, make_init

from gemma_mlp.sharding import optimizer_shardings
from train_toy import processes


def open_manager(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager(workdir / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    manager.save(step, args=ocp.args.StandardSave(state._asdict()))


def restore_or_init(
    manager: ocp.CheckpointManager, model: LanguageModel, optimizer, seed: int, shardings: TrainState
) -> tuple[TrainState, int]:
    """Returns (state, steps done so far) from the last checkpoint, or initialises the state if there is none.

    The checkpoint may have been written on another mesh.
    """

    def init():
        return make_init(model.init, optimizer)(jax.random.key(seed))

    step = manager.latest_step()
    if step is None:
        return jax.jit(init, out_shardings=shardings)(), 0

    def like(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    wanted = jax.tree.map(like, jax.eval_shape(init), shardings)
    restored = manager.restore(step, args=ocp.args.StandardRestore(wanted._asdict()))
    if processes.is_first():
        print(f"Continuing from the checkpoint of step {step}.")
    return TrainState(**restored), step


def state_shardings(api: str, sizes: tuple, model: LanguageModel, optimizer, placement: Placement) -> TrainState:
    """The sharding of every array of the state: by its logical axes if there is a mesh, else on the first device."""
    shapes = jax.eval_shape(make_init(model.init, optimizer), jax.random.key(0))
    if placement.mesh is None:
        return jax.tree.map(lambda _: placement.rows, shapes)
    params = language_model.shardings(api, sizes, placement.mesh, RULES)
    return TrainState(params, optimizer_shardings(optimizer, shapes.params, params, placement.mesh))
