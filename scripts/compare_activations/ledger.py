"""Saves each finished run in a file, so that an interrupted study continues where it stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from workdir import read_json_lines, write_atomically

Run = dict[str, Any]


class Ledger:
    """The finished runs of a study.

    Args:
      path: the file that holds them, one run a line. Each run is added as soon as it is finished.
      bar: the progress bar; it advances by one for each run.
    """

    def __init__(self, path: Path, bar: tqdm):
        self.path, self.bar = path, bar
        self.runs = read_json_lines(path)

    def run(self, measure: Callable[[], Run], **key: Any) -> Run:
        """Returns the run that `key` names. If the file does not have it, `measure()` measures it now."""
        key = json.loads(json.dumps(key))
        self.bar.set_description(" ".join(str(value) for value in key.values()))
        found = next((run for run in self.runs if all(run.get(name) == value for name, value in key.items())), None)
        if found is None:
            found = json.loads(json.dumps(key | measure()))
            self.runs.append(found)
            write_atomically(self.path, "".join(json.dumps(run) + "\n" for run in self.runs))
        self.bar.update()
        return found
