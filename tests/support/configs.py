"""The files in configs/, which are no package."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "configs"


def get_config(name, *arguments):
    """What `get_config(*arguments)` of configs/NAME.py gives."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)
