"""The records of a run: metrics as JSON lines and as TensorBoard events, and a figure of the loss."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from workdir import read_json_lines, write_atomically


class MetricsLog:
    """Appends to metrics.jsonl and to a TensorBoard event file. A run that continues drops records after `step`.

    Whenever the process dies, the event files hold every number of metrics.jsonl: a record is in the event file before
    its line is written. If event files lack numbers all the same, a run that continues writes them again, in order,
    from the first one that is missing.
    """

    def __init__(self, workdir: Path, step: int):
        path = metrics_path(workdir)
        before = [record for record in read_json_lines(path) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in before))
        self._lines = path.open("a", buffering=1)  # each line is written at once

        files = event_files(workdir)
        written = read_points(files)
        missing = (at for at, name, _ in points(before) if (at, name) not in written)
        start = min(missing, default=step + 1)
        # tensorboardX's SummaryWriter has a queue, which its flush does not wait for. Names are unique within a second.
        self._events = EventsWriter(str(workdir / "events"), filename_suffix=f".{len(files)}")
        self._event(start, session_log=SessionLog(status=SessionLog.START))  # hides what was there from this step on
        for at, name, value in points(before):
            if at >= start:
                self._event(at, summary=summary.scalar(name, value))
        self._events.flush()

    def write(self, step: int, **metrics: float) -> None:
        record = {"step": step, **metrics}
        for at, name, value in points([record]):
            self._event(at, summary=summary.scalar(name, value))
        self._events.flush()
        self._lines.write(json.dumps(record) + "\n")

    def text(self, step: int, name: str, text: str) -> None:
        self._event(step, summary=summary.text(name, text))
        self._events.flush()

    def _event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(step=step, wall_time=time.time(), **content))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._lines.close()
        self._events.close()


def event_files(workdir: Path) -> list[Path]:
    """The TensorBoard event files of a run, in the order in which TensorBoard reads them: their names have the time."""
    return sorted(workdir.glob("events.out.tfevents.*"))


def points(records: list[dict[str, Any]]) -> Iterator[tuple[int, str, float]]:
    """(step, name, value) of every number in the records of metrics.jsonl."""
    for record in records:
        yield from ((record["step"], name, value) for name, value in record.items() if name != "step")


def read_points(files: list[Path]) -> set[tuple[int, str]]:
    """(step, name) of every scalar that TensorBoard finds in event files.

    An event is preceded by its length (8 bytes) and a checksum (4 bytes), and followed by a checksum (4 bytes). A last
    event that an interruption cut short is left out.
    """
    found = set()
    for path in files:
        content, offset = path.read_bytes(), 0
        while offset + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, offset)
            if offset + length + 16 > len(content):
                break
            event = Event.FromString(content[offset + 12 : offset + 12 + length])
            offset += length + 16
            if event.session_log.status == SessionLog.START:
                found = {point for point in found if point[0] < event.step}
            found |= {(event.step, value.tag) for value in event.summary.value if value.HasField("simple_value")}
    return found


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
