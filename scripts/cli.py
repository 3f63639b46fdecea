"""The command line of the scripts: settings with their help, errors in one line, few logs."""

import difflib
import os
import re
import runpy
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import interruption  # before all that takes long to import
from absl import app, flags, logging
from ml_collections import config_flags

from gemma_mlp.checks import likely_fix, positive_int, require

CONFIGS = Path(__file__).parents[1] / "configs"
HELP = {"--help", "-help", "--helpshort", "-helpshort", "-?", "--?", "-h", "--h"}
COLUMN = 36  # where the help of a field begins
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class Field(NamedTuple):
    """A setting in a config file: its default, and the comment next to it."""

    default: Any
    help: str


FIELDS: dict[str, Field] = {}  # those of this command's config file

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
    with errors_in_one_line():
        FIELDS.update(read_fields(_chosen_file(sys.argv) or default))
        for argument in sys.argv[1:]:
            field = re.match(r"--?(?:no)?config\.([^=]+)", argument)
            if field and field[1] not in FIELDS and not any(known.startswith(field[1] + ".") for known in FIELDS):
                _refuse_flag(f"config.{field[1]}")
        return config_flags.DEFINE_config_file(
            "config", default, f"The file of settings. {about} Change a setting with --config.FIELD=VALUE."
        )


def read_fields(file: str) -> dict[str, Field]:
    """The fields in a config file, FILE or FILE:SIZE, by name. Those of a nested config are named PARENT.FIELD.

    Raises:
      ValueError: if there is no such file, or its get_config refuses the size.
    """
    path, *size = file.split(":", 1)
    require(Path(path).is_file(), "--config must name a file of settings.", repr(path), "check the path.")
    get_config = runpy.run_path(path)["get_config"]
    comments = dict(re.findall(r"^    config\.([\w.]+) = .*?  # (.+)$", Path(path).read_text(), re.MULTILINE))
    values = dict(flat(get_config(*size).to_dict()))
    order = [*(name for name in comments if name in values), *(name for name in values if name not in comments)]
    return {name: Field(values[name], comments.get(name, "")) for name in order}


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (name, value) pairs of a config. Those of a nested config are named PARENT.FIELD."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main` and exits with the code it returns.

    `--help` shows the script's docstring, its flags, and the fields of its config file. An error that says how to mend
    it ends the command with that line and status 1. Ctrl-C ends it with a line and status 130.
    """

    def checked(_: list[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)  # JAX and Orbax log a lot at INFO
        with errors_in_one_line(), interruption.interruptible(lambda: "The same command starts again."):
            interruption.unwind_on_ctrl_c()
            return main()

    try:
        app.run(checked, flags_parser=_parse)
    except SystemExit as end:
        if end.code != interruption.STATUS:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        # At once, since JAX may still compute: an orderly exit would crash, or wait for it.
        os._exit(interruption.STATUS)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the command with the message alone of an error that the user can mend, and status 1.

    These are errors of the system, of flags, and those that name a fix. All others are bugs and keep their traceback.
    """
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        if " Fix: " not in message:
            if not isinstance(error, (OSError, flags.Error)):
                raise
            message = f"{type(error).__name__}: {message}"
        raise SystemExit(message) from None


def require_names(field: str, names: Collection[str], known: Collection[str]) -> None:
    """Raises ValueError unless there are `names` and all are known. `field` is the field of the config with them."""
    unknown = [str(name) for name in names if name not in known]
    rule = f"config.{field} must be among {', '.join(known)}."
    fix = likely_fix(unknown[0], known) if unknown else "choose from these names."
    require(bool(names) and not unknown, rule, ", ".join(unknown) or "no name", fix)


def require_positive(values: dict[str, Any], but: Collection[str] = ()) -> None:
    """Raises ValueError unless the whole numbers in a config, also those in tuples, are at least 1.

    Args:
      values: the config, as a dict.
      but: the fields whose numbers may be less.
    """
    for name, value in flat(values):
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and name not in but:
                positive_int(f"config.{name}", number)


def _chosen_file(argv: list[str]) -> str | None:
    """The value of --config on the command line."""
    for argument, following in zip(argv, [*argv[1:], ""]):
        if found := re.fullmatch(r"--?config(?:=(.*))?", argument):
            return following if found[1] is None else found[1]
    return None


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags, or shows the help."""
    if HELP.intersection(argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}\nflags:\n{flags.FLAGS.main_module_help()}\n{_help_of_fields()}")
        raise SystemExit(0)
    with errors_in_one_line():
        try:
            rest = flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            _refuse_flag(error.flagname)
        except flags.IllegalFlagValueError as error:
            found = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
            if found and found[1] in FIELDS:
                _refuse_value(found[1], repr(found[2]))
            raise ValueError(f"{str(error).rstrip('.')}. Fix: --help says what each flag takes.") from error
        if len(rest) > 1:
            raise ValueError(f"Unknown arguments: {rest[1:]}. Fix: write --NAME=VALUE; --help lists the names.")
        if "config" in flags.FLAGS:
            _check_tuples(config_flags.get_override_values(flags.FLAGS["config"]))
        return rest


def _help_of_fields() -> str:
    if not FIELDS:
        return ""
    lines = ["\nfields of --config, with their defaults; --config.FIELD=VALUE changes one:\n"]
    for name, (default, about) in FIELDS.items():
        setting = f"  {name}={default!r}"
        if len(setting) > COLUMN:
            lines.append(setting)
            setting = ""
        lines.append(f"{setting:{COLUMN}}  {about}")
    return "\n".join(lines)


def _check_tuples(settings: dict[str, Any]) -> None:
    """The members of a tuple are of one type, which ml_collections does not check."""
    for name, value in settings.items():
        default = FIELDS[name].default if name in FIELDS else None
        if isinstance(default, tuple) and default:
            kind = type(default[0])
            if not all(type(each) is kind or (kind is float and type(each) is int) for each in value):
                _refuse_value(name, repr(value))


def _refuse_value(name: str, received: str) -> NoReturn:
    default = FIELDS[name].default
    kind = KINDS.get(type(default), f"a {type(default).__name__}")
    if isinstance(default, tuple) and default:
        kind = f"a tuple, each member {KINDS.get(type(default[0]), 'like those of the default')}"
    fix = f'pass a value like the default, --config.{name}="{default}".'
    raise ValueError(f"config.{name} must be {kind}. Got: {received}. Fix: {fix}")


def _refuse_flag(name: str) -> NoReturn:
    known = [*FIELDS, *(flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]))]
    known = [f"config.{each}" if each in FIELDS else each for each in known]
    close = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(f"config.{name}", known, 1)
    fix = f"did you mean --{close[0]}? --help lists all." if close else "--help lists all."
    raise ValueError(f"A setting must be one that this command has. Got: --{name}. Fix: {fix}")
