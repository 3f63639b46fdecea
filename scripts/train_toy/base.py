"""The base of a fine-tuning: a finished run, whose parameters stay frozen."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from byte_decoder import language_model
from byte_decoder.language_model import Params
from byte_decoder.placement import Placement

import gemma_mlp
from gemma_mlp.checks import require
from train_toy import checkpoints
from train_toy.run_config import RunConfig

SAME = ("embed_dim", "hidden_dim", "num_layers", "num_heads", "activation")  # in the base and in the fine-tuning


def identity(config: RunConfig) -> dict[str, Any]:
    """Everything that the base's parameters depend on: what its config.json holds.

    Raises:
      ValueError: if `config.base` is not the folder of a finished run, or that run is of another model or fine-tuned
        adapters itself.
    """
    folder = Path(config.base).resolve()
    file = folder / "config.json"
    theirs = json.loads(file.read_text()) if file.exists() else {}
    require(
        (folder / "checkpoints" / str(theirs.get("steps"))).exists(),
        "config.base must be the folder of a finished run, with the checkpoint of its last step.",
        repr(config.base),
        "check the path, or finish that run with the command that began it.",
    )
    require(
        "lora_rank" not in theirs,
        "config.base must be a run that trained all parameters.",
        f"{config.base!r}, which trained adapters",
        "pass the base of that run.",
    )
    differences = [
        f"{name} is {theirs.get(name)!r} in the base and {getattr(config, name)!r} here"
        for name in SAME
        if theirs.get(name) != getattr(config, name)
    ]
    require(
        not differences,
        "The base must have the sizes and the activation of this run.",
        "; ".join(differences),
        "pass the base's values with --config.FIELD=VALUE.",
    )
    return theirs


def load(config: RunConfig, steps: int, placement: Placement) -> Params:
    """The parameters of the finished run in `config.base` after its `steps` steps, in few bits if `config` says so."""
    mlp = dataclasses.replace(config.mlp, lora=None, weight_dtype=None, group_size=None, axis_rules=placement.rules)
    sizes = (mlp, config.num_layers, config.num_heads)
    model = language_model.make(config.api, *sizes)
    shardings = checkpoints.params_shardings(config.api, sizes, model, placement)
    params = checkpoints.restore_params(Path(config.base).resolve(), steps, model, shardings)
    if not config.base_dtype:
        return params
    group_size = config.base_group_size or None
    return placement.on(jax.jit(lambda params: gemma_mlp.quantize(params, config.base_dtype, group_size)))(params)
