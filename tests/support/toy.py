"""Short runs of scripts/train_toy.py: their configurations, and what they leave behind."""

import sys
from pathlib import Path

import pytest
from train_toy import records
from train_toy.run_config import RunConfig

from tests.support.configs import get_config

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "train_toy.py")]
SMALL = {
    "embed_dim": 16,
    "hidden_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "seq_len": 16,
    "batch_size": 8,
    "steps": 40,
    "log_every": 2,
    "eval_every": 20,
    "checkpoint_every": 10,
    "sample_bytes": 8,
}
ROUNDING = 2e-5  # relative, of the losses over 40 steps on different meshes; the largest measured is 4e-6


def config(workdir, text, **overrides):
    values = get_config("train_toy")
    values.update(SMALL | {"workdir": str(workdir), "data": str(text)} | overrides)
    return RunConfig(**values)


def flags(**settings):
    return [f"--config.{name}={value}" for name, value in settings.items()]


def metrics(workdir):
    return records.read_metrics(Path(workdir))


def curve(workdir):
    """{(step, name): value}, for a run whose records have no step twice."""
    values = [((record["step"], name), value) for record in metrics(workdir) for name, value in record.items()]
    values = [(key, value) for key, value in values if key[1] != "step"]
    assert len(dict(values)) == len(values)
    return dict(values)


def check_curve(workdir, expected):
    """The run has the losses of `expected`, up to float32 rounding."""
    got = curve(workdir)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=ROUNDING), key
