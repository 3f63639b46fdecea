"""What a power cut cannot undo: names and contents that are on the disk before the next step. The writers use it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, if they are not there yet, and waits until their names are on the disk."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync(path.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Waits until no other process is inside of this for the same folder. It gives False if there are no such locks.

    The operating system releases the lock when the process ends, however it ends. Some network file systems have none.
    """
    import fcntl  # Windows has no such module, and need not have it to read checkpoints

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            has_lock = False
        else:
            has_lock = True
        yield has_lock
    finally:
        os.close(descriptor)
