"""The folder of a run. It belongs to one configuration, and an interruption does not damage its files."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from gemma_mlp.checks import require
from gemma_mlp.disk import make_folder, sync


def make_workdir(workdir: Path) -> None:
    """Creates the folder if it is not there yet.

    Raises:
      ValueError: if no files can be written into it.
    """
    try:
        make_folder(workdir)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        reason = "a file" if workdir.is_file() else error.strerror
        raise ValueError(
            f"config.workdir must be a folder into which files can be written. Got: {str(workdir)!r} ({reason}). "
            "Fix: choose another with --config.workdir=FOLDER."
        ) from error


def claim_workdir(workdir: Path, identity: dict[str, Any]) -> None:
    """Creates `workdir` with `identity` in its config.json, or checks that the folder holds a run of that identity.

    Args:
      workdir: the folder.
      identity: everything that the run's numbers depend on.

    Raises:
      ValueError: if the folder holds another run, or no files can be written into it. The message names each
        difference.
    """
    make_workdir(workdir)
    path = workdir / "config.json"
    text = json.dumps(identity, indent=2)
    if not path.exists():
        write_atomically(path, text)
        return
    ours, theirs = json.loads(text), _read_json(path)
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


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    raise ValueError(
        f"The config.json in config.workdir must be that of a run. Got: {str(path)!r}, which is no JSON object. "
        "Fix: choose another folder with --config.workdir."
    )


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to the file. An interruption or a power cut leaves either the old file or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON object per line. A last line that an interruption cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
