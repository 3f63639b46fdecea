"""The folder of a run. It belongs to one configuration, and an interruption does not damage its files."""

import json
import os
from pathlib import Path
from typing import Any

from gemma_mlp.checks import require


def claim_workdir(workdir: Path, identity: dict[str, Any]) -> None:
    """Creates `workdir` with `identity` in its config.json, or checks that the folder holds a run of that identity.

    Args:
      workdir: the folder.
      identity: everything that the run's numbers depend on.

    Raises:
      ValueError: if the folder holds another run. The message names each difference.
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
        "A run must continue with the configuration and the data that it began with.",
        "; ".join(differences),
        f"choose another folder with --config.workdir, or delete {workdir} to start over.",
    )


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to the file. An interruption leaves either the old file or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON object per line. A last line that an interruption cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
