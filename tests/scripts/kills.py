"""Kills training runs and updates of checkpoints at random moments (SIGKILL), and checks what each kill leaves.

    PYTHONPATH=scripts python -m tests.scripts.kills train --kills=20 --seed=0
    PYTHONPATH=scripts python -m tests.scripts.kills update --kills=20 --seed=0

pytest does not collect this file: a person runs it, from the repository's root, on Linux. One to three kills follow one
another. Then the same command runs to its end. All takes some minutes. If a check fails, the folder of the runs stays.
"""

import argparse
import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
from byte_decoder import data
from train_toy import checkpoints

from gemma_mlp import MLPConfig, checkpoint
from gemma_mlp.checkpoint import safetensors_folder
from tests.scripts import toy
from tests.support import huggingface_folder
from tests.support.by_hand import arrays, equal, params

IN_A_ROW = 3  # kills follow one another at most
TRAINING = toy.SMALL | {"steps": 300, "checkpoint_every": 10}
SHARDS, LAYERS, SIZES = 4, 8, MLPConfig(embed_dim=512, hidden_dim=2048)  # 50 MB in bfloat16
UPDATES = """
# For each line "SOURCE FOLDER" a fresh process updates FOLDER. This one only imports, which takes most of the time.
import os, sys
from gemma_mlp import checkpoint

for line in sys.stdin:
    source, folder = line.split()
    pid = os.fork()
    if pid == 0:
        params = checkpoint.read_huggingface(source)
        print(os.getpid(), flush=True)
        checkpoint.update_huggingface(folder, params)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


# train_toy.py


def kill_training_runs(kills, rng, folder):
    """A run that was killed and continued is the run that was not: records, numbers, parameters and files."""
    (folder / "text.txt").write_bytes(data.python_documentation()[:20_000])
    command = toy.COMMAND + toy.flags(**TRAINING, data=folder / "text.txt")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    whole = folder / "whole"
    run(command, folder / "first")  # fills the cache of compiled programs
    cpu_seconds = run(command, whole)
    names, summary = file_names(whole), read_summary(whole)
    print(f"An uninterrupted run takes {cpu_seconds:.1f} s of CPU time.", flush=True)

    counts, number = collections.Counter(), 0
    while (done := counts["kills"]) < kills:
        workdir, number, latest = folder / f"run-{number}", number + 1, 0
        for _ in range(min(rng.integers(1, IN_A_ROW + 1), kills - done)):
            if not run_and_kill(command, workdir, rng.uniform(0, cpu_seconds)):
                print("  ended before its kill", flush=True)
                latest = TRAINING["steps"]
                break
            before, latest = latest, checkpoints.latest_step(str(workdir)) or 0
            assert latest >= before, "the kill took a checkpoint"
            where = place_of_kill(workdir, latest)
            counts.update(["kills", where])
            print(f"  kill {counts['kills']}: {where}; checkpoint of step {latest}", flush=True)
            check_killed(workdir, latest, whole)
        run(command, workdir)
        assert file_names(workdir) == names
        continued = read_summary(workdir)
        assert continued["continued_from_step"] == latest
        for own in ("continued_from_step", "seconds"):
            continued[own] = summary[own]
        assert continued == summary
        toy.check_records(workdir, read_summary(workdir), TRAINING["steps"], TRAINING["eval_every"])
        toy.check_same_runs(whole, summary, workdir, continued)
        counts.update(["runs continued to the end"])
    return counts


def run(command, workdir):
    """Runs the command to its end. Returns the CPU seconds that it took."""
    output = workdir.with_suffix(".log").open("wb")
    process = subprocess.Popen([*command, f"--config.workdir={workdir}"], stdout=output, stderr=output)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, Path(output.name).read_text()
    return usage.ru_utime + usage.ru_stime


def run_and_kill(command, workdir, cpu_seconds):
    """Kills the command when it has used so much CPU time: seconds of a clock depend on what else the machine does.

    Returns False if it ended by itself before.
    """
    output = workdir.with_suffix(".log").open("wb")
    process = subprocess.Popen([*command, f"--config.workdir={workdir}"], stdout=output, stderr=output)
    ticks = cpu_seconds * os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        if int(user) + int(system) >= ticks:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() in (0, -signal.SIGKILL), Path(output.name).read_text()
    return process.returncode != 0


def place_of_kill(workdir, latest):
    names = {path.name for path in (workdir / "checkpoints").glob("*")}
    if any(not name.isdecimal() for name in names):
        return "while a checkpoint was written"
    if not (workdir / "metrics.jsonl").exists():
        return "before training"
    return {0: "before the first checkpoint", TRAINING["steps"]: "after the last checkpoint"}.get(
        latest, "between checkpoints"
    )


def check_killed(workdir, latest, whole):
    """What was recorded is right, also as TensorBoard events, and complete up to the last checkpoint."""
    recorded, expected = toy.curve(workdir), toy.curve(whole)
    assert recorded.items() <= expected.items()
    assert {key for key in expected if key[0] <= latest} <= recorded.keys()
    events = toy.tensorboard_scalars(workdir)
    assert {key: np.float32(value) for key, value in recorded.items()}.items() <= events.items()


def file_names(workdir):
    """Of the files whose names hold the time or a hash, only that there are such."""

    def name(path):
        last = "events" if path.name.startswith("events.out.tfevents.") else path.name
        return str(path.relative_to(workdir).with_name("*" if path.parent.name == "d" else last))

    return {name(path) for path in workdir.rglob("*")}


def read_summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


# update_huggingface


def kill_updates(kills, rng, folder):
    """A folder whose update was killed has the old parameters or the new ones, and the next update tidies up."""
    settings = huggingface_folder.SETTINGS | {"num_hidden_layers": LAYERS}
    settings |= {"hidden_size": SIZES.embed_dim, "intermediate_size": SIZES.hidden_dim}
    layers = arrays(SIZES, LAYERS)
    sources = [folder / "a", folder / "b"]  # two folders to take parameters from
    versions = [params(layers), params(layers[::-1])]
    for source, own in zip(sources, (layers, layers[::-1])):
        huggingface_folder.write(source, own, SHARDS, settings)
    updated = huggingface_folder.write(folder / "updated", layers, SHARDS, settings)
    others = other_tensors(updated)
    (updated / "notes-update-0a1b2c3d.safetensors").write_bytes(
        b"not ours"
    )  # looks like a file of an update, and is none
    count = len(list(updated.iterdir()))

    def held():
        got = checkpoint.read_huggingface(updated)
        (version,) = (number for number, version in enumerate(versions) if equal(got, version))
        assert equal(other_tensors(updated), others)
        return version

    updates = subprocess.Popen(
        [sys.executable, "-c", UPDATES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert updates.stdin is not None and updates.stdout is not None

    def start_update(source):
        """Returns the process, which has read the new parameters and is about to write them."""
        print(source, updated, file=updates.stdin, flush=True)
        return int(updates.stdout.readline())

    def was_killed():
        """Waits until the process has ended."""
        status = int(updates.stdout.readline())
        assert status in (0, -signal.SIGKILL)
        return status != 0

    start_update(sources[1])
    seconds = time.monotonic()
    assert not was_killed()
    seconds = time.monotonic() - seconds
    print(f"An update of {SHARDS} shards takes {seconds:.2f} s.", flush=True)

    counts = collections.Counter()
    while (done := counts["kills"]) < kills:
        new = 1 - held()
        for _ in range(min(rng.integers(1, IN_A_ROW + 1), kills - done)):
            process = start_update(sources[new])
            time.sleep(rng.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            if not was_killed():
                print("  ended before its kill", flush=True)
                break
            unnamed = len(list(updated.iterdir())) - count
            where = "left the " + ("new" if held() == new else "old")
            counts.update(["kills", where, *[f"{where}, and files that nothing names"] * bool(unnamed)])
            print(f"  kill {counts['kills']}: {where}, {unnamed} files that nothing names", flush=True)
        checkpoint.update_huggingface(updated, versions[new])
        assert held() == new
        assert len(list(updated.iterdir())) == count, sorted(path.name for path in updated.iterdir())
        counts.update(["updates repeated"])
    updates.stdin.close()
    assert updates.wait() == 0
    return counts


def other_tensors(folder):
    """The tensors that are not the block's, read by safetensors from the files that the index names."""
    files = safetensors_folder.list_files(folder)
    return {name: safetensors.numpy.load_file(files[name])[name] for name in huggingface_folder.others(LAYERS)}


def main():
    parser = argparse.ArgumentParser(description="Kills processes at random moments, and checks what is left.")
    parser.add_argument("what", choices=("train", "update"), help="what to kill: train_toy.py or update_huggingface")
    parser.add_argument("--kills", type=int, default=20, help="how many kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    check = {"train": kill_training_runs, "update": kill_updates}[arguments.what]
    folder = Path(tempfile.mkdtemp())
    print(f"In {folder}, which is removed at the end if all is right.", flush=True)
    counts = check(arguments.kills, np.random.default_rng(arguments.seed), folder)
    shutil.rmtree(folder)
    print("\n".join(f"{count:4} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
