"""The configuration of a run, with types and rules for the values in configs/train_toy.py."""

import dataclasses

from gemma_mlp import MLPConfig
from gemma_mlp.checks import require


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run. The comments in configs/train_toy.py say what each field means.

    Raises:
      ValueError: if a size or an interval is below 1, a share is outside of [0, 1), or the heads do not divide the
        width.
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int and field.name != "seed":
                self._require(field.name, getattr(self, field.name) >= 1, "at least 1")
        for name in ("heldout_fraction", "warmup_fraction"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("embed_dim", self.embed_dim % (2 * self.num_heads) == 0, "a multiple of 2 * num_heads")

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
        )

    def identity(self) -> dict:
        """The fields that the run's numbers depend on. They must not change when a run continues."""
        free = {"workdir", "mesh", "log_every", "checkpoint_every", "sample_bytes", "prompt", "check_values"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
