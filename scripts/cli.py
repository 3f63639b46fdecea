"""The command line of the scripts: a `--config` flag, errors for unknown arguments, and no logs below a warning."""

from collections.abc import Callable, Iterable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from gemma_mlp.checks import require

CONFIGS = Path(__file__).parents[1] / "configs"

flags.disclaim_key_flags()  # without this line --config would belong to this file, and --help would not list it


def config(name: str, about: str, size: str | None = None) -> flags.FlagHolder:
    """Defines `--config`, which reads configs/NAME.py by default.

    Args:
      name: the name of the tool, and of its file in configs/.
      about: a sentence about the file, for `--help`.
      size: the default argument of the file's get_config, if that takes a size.

    Returns:
      A flag. Its `value` is the ConfigDict, with the settings of the command line.
    """
    path = CONFIGS / f"{name}.py"
    default = str(path) if size is None else f"{path}:{size}"
    return config_flags.DEFINE_config_file(
        "config", default, f"The file of settings. {about} Change a setting with --config.FIELD=VALUE."
    )


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main` and exits with the code it returns. `--help` shows the script's docstring."""

    def checked(argv: list[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)  # JAX and Orbax log a lot at INFO
        if len(argv) > 1:
            raise app.UsageError(f"Unknown arguments: {argv[1:]}")
        return main()

    app.run(checked)


def require_names(field: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError unless all `names` are known. `field` is the field of the config that holds them."""
    unknown = [name for name in names if name not in known]
    rule = f"config.{field} must be among {', '.join(known)}."
    require(not unknown, rule, ", ".join(unknown), "choose from these names.")
