"""Short runs of scripts/train_toy.py: their configurations, and what they leave behind."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from train_toy import checkpoints, records, run
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


def interrupt_at(last, config, monkeypatch):
    """Trains, and interrupts the run when it records step `last`."""

    def interrupt(step, loss):
        if step == last:
            raise KeyboardInterrupt
        return bits(step, loss)

    bits = run.bits
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "bits", interrupt)
        run.train(config)


def kill_after_step(step, command, workdir):
    """Runs `command` in `workdir`, and kills it when the checkpoint of `step` is there."""
    process = subprocess.Popen(
        [*command, f"--config.workdir={workdir}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (workdir / "checkpoints" / str(step)).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def check_records(workdir, summary, steps, eval_every):
    """The run left a summary, a figure, a sample, and every loss both as a JSON line and as a TensorBoard event."""
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert summary["sample"].count("|") >= 1
    history = metrics(workdir)
    assert [record["step"] for record in history if "train_bits_per_byte" in record] == list(range(1, steps + 1))
    evaluated = [record["step"] for record in history if "heldout_bits_per_byte" in record]
    assert evaluated == list(range(eval_every, steps + 1, eval_every))
    assert history[-1]["heldout_bits_per_byte"] == summary["heldout_bits_per_byte"]
    assert tensorboard_scalars(workdir) == {
        (record["step"], name): np.float32(value)
        for record in history
        for name, value in record.items()
        if name != "step"
    }


def tensorboard_scalars(workdir):
    """{(step, tag): value} from the event files, whose records are length, checksum, protocol buffer, checksum.

    As in TensorBoard, a value hides earlier ones of its tag from the same step on, and so does a restart for all tags.
    """
    scalars = {}
    for path in sorted(Path(workdir).glob("events.out.tfevents.*")):
        content, offset = path.read_bytes(), 0
        while offset + 16 <= len(content):
            (length,) = struct.unpack_from("<Q", content, offset)
            body = content[offset + 12 : offset + 12 + length]
            if len(body) < length:  # an event that an interruption cut short
                break
            event = event_pb2.Event.FromString(body)
            if event.session_log.status == event_pb2.SessionLog.START:
                scalars = {key: value for key, value in scalars.items() if key[0] < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    hidden = [key for key in scalars if key[1] == value.tag and key[0] >= event.step]
                    for key in hidden:
                        del scalars[key]
                    scalars[event.step, value.tag] = np.float32(value.simple_value)
            offset += length + 16
    return scalars


def final_state(workdir):
    """The arrays of the last checkpoint."""
    with checkpoints.open_manager(Path(workdir).resolve()) as manager:
        return manager.restore(manager.latest_step())


def check_same_runs(workdir, summary, other, other_summary):
    assert summary["sample"] == other_summary["sample"]
    assert metrics(workdir) == metrics(other)
    for a, b in zip(*(jax.tree.leaves(final_state(folder)) for folder in (workdir, other)), strict=True):
        np.testing.assert_array_equal(a, b)
