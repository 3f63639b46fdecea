"""The configuration of a run, with types and rules for the values in configs/train_toy.py."""

import dataclasses
import math
from pathlib import Path

from gemma_mlp import LoRA, MLPConfig
from gemma_mlp.checks import require, require_choice
from gemma_mlp.weights import WEIGHT_DTYPES

ADAPTERS = ("lora_rank", "lora_alpha", "base", "base_dtype", "base_group_size")  # the fields of a fine-tuning


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run. The comments in configs/train_toy.py say what each field means.

    Raises:
      ValueError: if a size or an interval is below 1, a share is outside of [0, 1), a number is one that cannot be
        trained with, or the heads do not divide the width, or the fields of a fine-tuning do not fit together.
    """

    api: str
    workdir: str
    seed: int
    data: str
    heldout_fraction: float
    heldout_max_bytes: int
    embed_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    activation: str
    dtype: str
    save: str
    mesh: str
    seq_len: int
    batch_size: int
    steps: int
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    log_every: int
    eval_every: int
    checkpoint_every: int
    sample_bytes: int
    prompt: str
    check_values: bool
    lora_rank: int
    lora_alpha: float
    base: str
    base_dtype: str
    base_group_size: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int and field.name != "seed":
                least = 0 if field.name in ADAPTERS else 1
                self._require(field.name, getattr(self, field.name) >= least, f"at least {least}")
        for name in ("heldout_fraction", "warmup_fraction"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        self._require("seed", 0 <= self.seed < 2**32, "from 0 to 2**32 - 1")
        self._require("embed_dim", self.embed_dim % (2 * self.num_heads) == 0, "a multiple of 2 * num_heads")
        given = [name for name in ADAPTERS if getattr(self, name)]
        require(
            not given or {"lora_rank", "base"} <= set(given),
            "A fine-tuning must have both config.lora_rank and config.base, and another run has neither.",
            ", ".join(f"{name}={getattr(self, name)!r}" for name in given),
            "pass --config.lora_rank=8 --config.base=FOLDER, where FOLDER is the workdir of a finished run.",
        )
        self._require(
            "workdir",
            not self.base or Path(self.base).resolve() != Path(self.workdir).resolve(),
            "another folder than config.base",
        )
        if self.base_dtype:
            require_choice("config.base_dtype", self.base_dtype, WEIGHT_DTYPES)

    def _require(self, name: str, condition: bool, rule: str) -> None:
        require(condition, f"config.{name} must be {rule}.", str(getattr(self, name)), f"pass --config.{name}=VALUE.")

    @property
    def mlp(self) -> MLPConfig:
        """The configuration of the model's feed-forward blocks."""
        return MLPConfig(
            embed_dim=self.embed_dim,
            hidden_dim=self.hidden_dim,
            activation=self.activation,  # pyright: ignore[reportArgumentType]  # checked at construction
            dtype=self.dtype,
            save=self.save,  # pyright: ignore[reportArgumentType]
            weight_dtype=self.base_dtype or None,  # pyright: ignore[reportArgumentType]
            group_size=self.base_group_size or None,
            lora=LoRA(self.lora_rank, self.lora_alpha or None) if self.lora_rank else None,
        )

    def identity(self) -> dict:
        """The fields that the run's numbers depend on. They must not change when a run continues."""
        free = {"workdir", "base", "mesh", "log_every", "checkpoint_every", "sample_bytes", "prompt", "check_values"}
        if not self.lora_rank:
            free |= set(ADAPTERS)
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
