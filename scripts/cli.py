"""The command line that the scripts share: one `--config` flag, no unknown arguments, no log lines below a warning."""

from collections.abc import Callable, Iterable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from gemma_mlp.checks import require

CONFIGS = Path(__file__).parents[1] / "configs"

flags.disclaim_key_flags()  # --help lists the flags of the script; without this line --config would count as ours


def config(name: str, about: str, size: str | None = None) -> flags.FlagHolder:
    """Defines `--config`, which reads configs/NAME.py by default.

    Args:
      name: the tool, and so the file in configs/.
      about: what the configuration describes; `--help` shows it.
      size: what the file's get_config takes by default, if it takes a size.

    Returns:
      A flag whose `value` is the ConfigDict with the command line's overrides.
    """
    path = CONFIGS / f"{name}.py"
    default = str(path) if size is None else f"{path}:{size}"
    return config_flags.DEFINE_config_file("config", default, f"{about} Override a field with --config.FIELD=VALUE.")


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main` and exits with the code it returns. `--help` shows the script's docstring."""

    def checked(argv: list[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)  # JAX and Orbax log a lot at INFO
        if len(argv) > 1:
            raise app.UsageError(f"Unknown arguments: {argv[1:]}")
        return main()

    app.run(checked)


def require_names(field: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError unless every one of `names` is known; `field` is the config's field that holds them."""
    unknown = [name for name in names if name not in known]
    rule = f"config.{field} must be among {', '.join(known)}."
    require(not unknown, rule, ", ".join(unknown), "use these names.")
