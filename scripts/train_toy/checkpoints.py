"""The checkpoints of a run: Orbax writes them, and any mesh can restore them. They hold what is trained."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from byte_decoder import language_model
from byte_decoder.language_model import LanguageModel, Params
from byte_decoder.placement import RULES, Placement
from byte_decoder.training import TrainState, make_init

from gemma_mlp.sharding import optimizer_shardings
from train_toy import processes


def open_manager(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager(workdir / "checkpoints", options=options)


def latest_step(workdir: str) -> int | None:
    """The step of the last checkpoint in the folder of a run, which need not exist."""
    return max(ocp.utils.checkpoint_steps(Path(workdir).resolve() / "checkpoints"), default=None)


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
    wanted = _targets(jax.eval_shape(init), shardings)
    restored = manager.restore(step, args=ocp.args.StandardRestore(wanted._asdict()))
    if processes.is_first():
        print(f"Continuing from the checkpoint of step {step}.")
    return TrainState(**restored), step


def restore_params(workdir: Path, step: int, model: LanguageModel, shardings: Params) -> Params:
    """The parameters of a run's checkpoint of `step`, without its optimizer state."""
    wanted = {"params": _targets(jax.eval_shape(model.init, jax.random.key(0)), shardings)}
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    with open_manager(workdir) as manager:
        restore = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
        return manager.restore(step, args=restore)["params"]


def _targets(shapes: Any, shardings: Any) -> Any:
    """What to restore: each array's shape and dtype, and where to put it."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def params_shardings(api: str, sizes: tuple, model: LanguageModel, placement: Placement) -> Params:
    """The sharding of what `model.init` returns: by its logical axes if there is a mesh, else on the first device."""
    if placement.mesh is None:
        return jax.tree.map(lambda _: placement.rows, jax.eval_shape(model.init, jax.random.key(0)))
    return language_model.shardings(api, sizes, placement.mesh, RULES)


def state_shardings(api: str, sizes: tuple, model: LanguageModel, optimizer, placement: Placement) -> TrainState:
    """The sharding of every array of the state."""
    shapes = jax.eval_shape(make_init(model.init, optimizer), jax.random.key(0))
    if placement.mesh is None:
        return jax.tree.map(lambda _: placement.rows, shapes)
    params = params_shardings(api, sizes, model, placement)
    return TrainState(params, optimizer_shardings(optimizer, shapes.params, params, placement.mesh))
