"""What a run leaves behind to look at: JSON lines, TensorBoard events, a plot, a summary."""

import json
import os
from pathlib import Path
from typing import Any

import matplotlib
import tensorboardX

from gemma_mlp.checks import require

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class MetricsLog:
    """Appends to metrics.jsonl and to a TensorBoard event file; a continued run goes on after `step`."""

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._lines = self.path.open("a")
        self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1)

    def write(self, step: int, **metrics: float) -> None:
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._events.add_text(name, text, step)

    def flush(self) -> None:
        self._lines.flush()
        self._events.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._lines.close()
        self._events.close()


class NoLog:
    """In place of a MetricsLog, in the processes of a run that leave the records to the first."""

    def write(self, step: int, **metrics: float) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def flush(self) -> None: ...

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_) -> None: ...


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that an interruption cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_atomically(path: Path, text: str) -> None:
    """Writes the whole of `text` or leaves the old file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def claim_workdir(workdir: Path, identity: dict[str, Any]) -> None:
    """Writes what the run is made of into a new folder; refuses a folder that holds another run.

    Raises:
      ValueError: if the folder's own run differs, naming each difference.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    text = json.dumps(identity, indent=2)
    if not path.exists():
        write_atomically(path, text)
        return
    ours, theirs = json.loads(text), json.loads(path.read_text())
    differences = [
        f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    require(
        not differences,
        "A run goes on with the configuration and the data it began with.",
        "; ".join(differences),
        f"choose another folder with --config.workdir, or delete {workdir} to start over.",
    )


def plot_loss(path: Path, metrics: list[dict[str, Any]], yardsticks: dict[str, float]) -> None:
    """Draws bits per byte over steps, training and held out, with the yardsticks as lines."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, marker in (
        ("train_bits_per_byte", "training batch", ""),
        ("heldout_bits_per_byte", "held out", "o"),
    ):
        points = [(record["step"], record[name]) for record in metrics if name in record]
        axes.plot(*zip(*points), label=label, marker=marker)
    for (name, bits), style in zip(yardsticks.items(), ("--", ":")):
        axes.axhline(bits, label=f"{name}: {bits:.2f}", linestyle=style, color="gray")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
