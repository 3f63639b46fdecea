"""Ctrl-C ends a command of this folder with one line and status 130.

`cli` imports this file first, so that this also holds while JAX is being imported, which takes seconds.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

STATUS = 130  # 128 + SIGINT, as shells count


def _end_at_once(_signal, _frame) -> NoReturn:
    os.write(2, b"\nInterrupted. The same command starts again.\n")
    os._exit(STATUS)


def _interrupt(_signal, _frame) -> NoReturn:
    signal.signal(signal.SIGINT, _end_at_once)  # if the user does not want to wait for the ending
    logging.disable()  # libraries log the traceback of an interruption that passes through them
    raise KeyboardInterrupt


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # not in tests that import this file
    signal.signal(signal.SIGINT, _end_at_once)


def unwind_on_ctrl_c() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, so that what is open gets closed. A second one ends at once."""
    signal.signal(signal.SIGINT, _interrupt)


@contextmanager
def interruptible(saved: Callable[[], str]) -> Iterator[None]:
    """After Ctrl-C, prints one line and raises SystemExit with status 130.

    Args:
      saved: returns the sentences that say what is saved, and what the same command would do.
    """
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not _comes_from_ctrl_c(error):
            raise
        print(f"\nInterrupted. {saved()}", file=sys.stderr)
        raise SystemExit(STATUS) from None


def _comes_from_ctrl_c(error: BaseException | None) -> bool:
    """Whether it is a KeyboardInterrupt, or an error that one led to while a library closed its files."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
