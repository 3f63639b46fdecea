"""What has been measured, one run a line, so that an interrupted comparison goes on where it stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from train_toy.records import read_metrics, write_atomically

Run = dict[str, Any]


class Ledger:
    """The runs of a folder's runs.jsonl; `bar` moves on by one with each.

    Args:
      path: the file; each finished run is added to it at once, by replacing the whole file.
      bar: shows progress.
    """

    def __init__(self, path: Path, bar: tqdm):
        self.path, self.bar = path, bar
        self.runs = read_metrics(path)

    def run(self, measure: Callable[[], Run], **key: Any) -> Run:
        """The run called `key`, as it was recorded or else as `measure()` gives it now."""
        key = json.loads(json.dumps(key))
        self.bar.set_description(" ".join(str(value) for value in key.values()))
        found = next((run for run in self.runs if all(run.get(name) == value for name, value in key.items())), None)
        if found is None:
            found = json.loads(json.dumps(key | measure()))
            self.runs.append(found)
            write_atomically(self.path, "".join(json.dumps(run) + "\n" for run in self.runs))
        self.bar.update()
        return found
