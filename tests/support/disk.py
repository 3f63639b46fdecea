"""A model of a disk, for tests of writers: every state in which a crash may leave the files that are being written.

It assumes no more than POSIX promises. `fsync` of a file makes its content durable, and `fsync` of a folder makes the
names in it durable. Until then each new name, renaming and removal may have reached the disk or not, whatever the
others did, but never in part. Of content that is not durable all may be there, none, or the first half.
"""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CALLS = ("fsync", "replace", "rename", "unlink", "remove", "mkdir")  # of the module os; pathlib calls them too
Tree = tuple[tuple[str, bytes | None], ...]  # relative paths with the contents of files, None for folders


@dataclasses.dataclass(eq=False)
class File:
    durable: bytes = b""
    written: bytes = b""


@dataclasses.dataclass(eq=False)
class Folder:
    durable: "dict[str, File | Folder]" = dataclasses.field(default_factory=dict)
    pending: "list[dict[str, File | Folder | None]]" = dataclasses.field(default_factory=list)  # None: removed

    def names(self, kept: Callable[[int], bool] = lambda i: True) -> "dict[str, File | Folder]":
        """The folder after those of the pending changes that are `kept`."""
        names: Any = dict(self.durable)
        for i, change in enumerate(self.pending):
            names |= change if kept(i) else {}
        return {name: node for name, node in names.items() if node is not None}


class Disk:
    """What is below `root`, which is durable at first. It records the calls of a writer inside of :meth:`recording`.

    Attributes:
      crashes: for each moment between two calls, in order, all states that a crash may leave. The last moment is after
        the writer has returned.
    """

    def __init__(self, root: Path):
        self.root, self.crashes = root, []
        self._nodes: dict[int, File | Folder] = {}  # by inode
        self._root = Folder()
        self._observe()
        for node in (self._root, *self._nodes.values()):
            _sync(node)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._recorded(name, getattr(os, name)))
            yield
        self._observe()
        self.crashes.append(list(dict.fromkeys(self._states())))

    def _recorded(self, name, function):
        def call(*args, **kwargs):
            self._observe()
            self.crashes.append(list(dict.fromkeys(self._states())))
            inode = None
            if name in ("replace", "rename"):
                source, target = map(Path, args)
                assert source.parent == target.parent, "a renaming between folders is not modelled"
                folder = self._folder(source.parent)
                node = folder.names()[source.name]
                inode = target.stat().st_ino if target.exists() else None
            elif name in ("unlink", "remove") and os.path.lexists(args[0]):
                inode = os.lstat(args[0]).st_ino
            elif name == "fsync":
                synced = self._root if _is(args[0], self.root) else self._nodes.get(os.fstat(args[0]).st_ino)
            result = function(*args, **kwargs)
            self._nodes.pop(inode, None)  # a later file may get this number
            if name in ("replace", "rename"):
                folder.pending.append({source.name: None, target.name: node})
            elif name == "fsync" and synced is not None:
                _sync(synced)
            return result

        return call

    def _folder(self, path: Path) -> Folder:
        folder = self._root
        for name in path.relative_to(self.root).parts:
            folder = folder.names()[name]
            assert isinstance(folder, Folder)
        return folder

    def _observe(self, path: Path | None = None, folder: Folder | None = None) -> None:
        """Takes over what has been written since the last call: new names, removals and contents."""
        path, folder = path or self.root, folder or self._root
        present = {}
        for entry in os.scandir(path):
            new = Folder() if entry.is_dir(follow_symlinks=False) else File()
            present[entry.name] = self._nodes.setdefault(entry.inode(), new)
        before = folder.names()
        for name in sorted(before.keys() | present.keys()):
            if before.get(name) is not present.get(name):
                folder.pending.append({name: present.get(name)})
        for name, node in present.items():
            if isinstance(node, Folder):
                self._observe(path / name, node)
            else:
                node.written = (path / name).read_bytes()

    def _states(self) -> Iterator[Tree]:
        nodes = [self._root, *self._nodes.values()]
        changes = [(node, i) for node in nodes if isinstance(node, Folder) for i in range(len(node.pending))]
        files = [node for node in nodes if isinstance(node, File) and node.durable != node.written]
        contents = [*_choices(files, lambda file: file.written, lambda file: file.durable)]
        contents += [
            {id(file): file.written[: (half := len(file.written) // 2)] + file.durable[half:] for file in files}
        ]
        for kept in _choices(changes, lambda _: True, lambda _: False, key=lambda change: (id(change[0]), change[1])):
            for content in contents:
                yield tuple(_tree(self._root, kept, content))


def _is(descriptor: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(descriptor), path.stat())


def _sync(node: File | Folder) -> None:
    if isinstance(node, File):
        node.durable = node.written
    else:
        node.durable, node.pending = node.names(), []


def _choices(items, yes, no, key=id) -> Iterator[dict]:
    """Every choice of some of up to 3 items. Of more: all, none, each alone, and all but each."""
    indices = range(len(items))
    some = itertools.chain.from_iterable(itertools.combinations(indices, n) for n in range(len(items) + 1))
    if len(items) > 3:
        alone = [{i} for i in indices]
        some = [set(), set(indices), *alone, *(set(indices) - one for one in alone)]
    for chosen in some:
        yield {key(item): (yes if i in chosen else no)(item) for i, item in enumerate(items)}


def _tree(folder, kept, content, path="") -> Iterator[tuple[str, bytes | None]]:
    for name, node in sorted(folder.names(lambda i: kept[id(folder), i]).items()):
        if isinstance(node, Folder):
            yield f"{path}{name}", None
            yield from _tree(node, kept, content, f"{path}{name}/")
        else:
            yield f"{path}{name}", content.get(id(node), node.durable)


def check_every_crash(
    root: Path, scratch: Path, write: Callable[[], Any], read: Callable[[Path], Any], old: Any, new: Any
) -> None:
    """Runs `write`, which writes below `root`, and reads what each crash may leave. It must be `old` or `new`.

    Once `write` has returned it must be `new`.

    Args:
      root: a folder that holds everything that `write` changes.
      scratch: a folder for the states, outside of `root`.
      write: the writer.
      read: takes the folder of a state, in place of `root`. What it raises fails the test.
      old: what `read` gives before the call.
      new: what `read` gives after it.
    """
    disk, found = Disk(root), {}
    assert read(root) == old != new
    with disk.recording():
        write()
    assert read(root) == new
    for moment, states in enumerate(disk.crashes):
        returned = moment == len(disk.crashes) - 1
        for state in states:
            if state not in found:
                folder = scratch / str(len(found))
                folder.mkdir(parents=True)
                for name, content in state:
                    (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
                found[state] = read(folder)
            there = ", ".join(f"{name} {'' if content is None else len(content)}".strip() for name, content in state)
            when = "after the writer had returned" if returned else f"before call {moment + 1}"
            what = f"a crash {when} leaves {there or 'nothing'}, and this reads {found[state]!r:.200}"
            assert found[state] == new or (found[state] == old and not returned), what
    assert any(value == old for value in found.values()), "no crash was early enough to leave the old"
