"""The records of a run: metrics as JSON lines and as TensorBoard events, and a figure of the loss."""

import json
from pathlib import Path
from typing import Any

import tensorboardX
from matplotlib.figure import Figure
from workdir import read_json_lines, write_atomically


class MetricsLog:
    """Appends to metrics.jsonl and to a TensorBoard event file. A run that continues drops records after `step`."""

    def __init__(self, workdir: Path, step: int):
        path = metrics_path(workdir)
        before = [record for record in read_json_lines(path) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in before))
        self._lines = path.open("a")
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


def metrics_path(workdir: Path) -> Path:
    return workdir / "metrics.jsonl"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records in the metrics.jsonl of a run."""
    return read_json_lines(metrics_path(workdir))


def plot_loss(path: Path, metrics: list[dict[str, Any]], yardsticks: dict[str, float]) -> None:
    """Draws bits per byte of training batches and of the held-out text over steps, and a line for each yardstick."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, marker in (
        ("train_bits_per_byte", "training batch", ""),
        ("heldout_bits_per_byte", "held out", "o"),
    ):
        points = [(record["step"], record[name]) for record in metrics if name in record]
        axes.plot(*zip(*points), label=label, marker=marker)
    for (name, bits), style in zip(yardsticks.items(), ("--", ":", "-.")):
        axes.axhline(bits, label=f"{name}: {bits:.2f}", linestyle=style, color="gray")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
