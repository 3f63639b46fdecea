"""Loads the files of configs/, which is not a package."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "configs"


def get_config(name, *arguments):
    """The result of get_config(*arguments) in configs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)
