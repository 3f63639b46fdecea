"""Folders of safetensors files, as Hugging Face writes them: one file, or several shards and an index.

All reads and writes of these files are here. The writes are safe against a crash, as this folder's README says. Orbax
does its own crash-safe writes, which checkpoint/orbax.py calls.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from gemma_mlp.checks import require
from gemma_mlp.disk import make_folder, sync
from gemma_mlp.layouts.layout import Slot

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UPDATED = re.compile(r"-update-[0-9a-f]{8}$")  # at the end of the name of a file that an update has written
SHARD_BYTES = 5 * 10**9  # the size of Hugging Face's own shards

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # others keep their names


class Header(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if there is no such file, or it holds something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file. Got: {error}. Fix: give the checkpoint's own folder.") from error
    require(isinstance(value, dict), f"{path} must hold a JSON object.", type(value).__name__, "download it again.")
    return value


def list_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, by name. Raises ValueError if the index is not sound or contradicts the single file.

    A file that the index names need not be there: it may hold layers that nobody asks for.
    """
    present = [name for name in (SINGLE, INDEX) if (folder / name).exists()]
    fix = "give the folder that holds it; files in other formats (.bin, .pt) are pickles, which are never opened."
    if any(folder.glob("*.gguf")):
        fix = "read the GGUF file with read_gguf."
    received = " and ".join(sorted(path.name for path in folder.glob("*"))[:5]) or "nothing"
    require(len(present) > 0, f"{folder} must hold either {SINGLE} or {INDEX}.", received, fix)
    single: dict[str, Path] = {}
    if SINGLE in present:
        with opened(folder / SINGLE) as file:
            single = dict.fromkeys(file.keys(), folder / SINGLE)
    if INDEX not in present:
        return single
    names: Any = read_json(folder / INDEX).get("weight_map")
    require(
        isinstance(names, dict) and bool(names) and all(isinstance(name, str) for name in names.values()),
        f"{folder / INDEX} must have a weight_map from names of tensors to names of files.",
        repr(names)[:100],
        "download it again.",
    )
    for tensor, name in names.items():
        # A link in the folder may lead anywhere: Hugging Face's cache consists of links, which the user has made.
        require(
            PurePosixPath(name).parts == (name,) and name not in (".", "..") and name.endswith(".safetensors"),
            f"{folder / INDEX} must name safetensors files in its own folder.",
            f"{name!r} for {tensor}",
            "do not load this checkpoint: such a path escapes the folder or is a pickle.",
        )
    files = {tensor: folder / name for tensor, name in names.items()}
    for name in (*single, *files) if SINGLE in present else ():
        require(
            name in single and files.get(name) == folder / SINGLE,
            f"{folder} holds {SINGLE} and {INDEX}, so they must agree that the one file holds every tensor.",
            f"{name}, which is {'' if name in single else 'not '}in {SINGLE}; the index says {names.get(name)!r}",
            "remove the stale one of the two.",
        )
    return files


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. If the file is not sound, the error is a ValueError that names it."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError, OverflowError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file. Got: {error}. Fix: download it again; it may be cut short."
        ) from error


def read_headers(files: Mapping[str, Path], wanted: Container[str]) -> dict[str, Header | None]:
    """The headers of all tensors in those files that hold a `wanted` one. No other file is opened.

    The result has None for tensors of unopened files. Tensors that the index misplaces are absent from it.
    """
    needed = {path for name, path in files.items() if name in wanted}
    headers: dict[str, Header | None] = {name: None for name, path in files.items() if path not in needed}
    for path in sorted(needed):
        first = next(name for name in files if files[name] == path and name in wanted)
        fix = "download the missing shard, or choose other layers with layers=."
        require(path.is_file(), f"{first} must be in {path}, as the index says.", "no such file", fix)
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if files.get(name) == path:
                    part = file.get_slice(name)
                    dtype = str(part.get_dtype())
                    headers[name] = Header(tuple(part.get_shape()), DTYPES.get(dtype, dtype))
    return headers


def read_slot(path: Path, slot: Slot, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a leaf, or the part of it that `index` selects, from the file that holds its tensor."""
    with opened(path) as file:  # Reopen it for each part: pages of a mapped file count as memory until it is closed.
        return slot.read(file.get_slice(slot.tensor), index)


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Reads a whole tensor, of float8_e4m3fn too."""
    fix = "download the missing shard, or choose other layers with layers=."
    require(path.is_file(), f"{name} must be in {path}, as the index says.", "no such file", fix)
    with opened(path) as file:
        require(name in file.keys(), f"{name} must be in {path}.", "no such tensor", "download it again.")  # noqa: SIM118
        part = file.get_slice(name)
        if part.get_dtype() != "F8_E4M3":
            return file.get_tensor(name)
        with path.open("rb") as raw:  # safetensors makes no NumPy array of this dtype
            begin, end = _places(raw)[name]
            raw.seek(begin)
            return np.frombuffer(raw.read(end - begin), ml_dtypes.float8_e4m3fn).reshape(part.get_shape())


def _places(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor begin and end in an open file. safetensors does not say it."""
    length = int.from_bytes(file.read(8), "little")  # of the JSON that follows
    header = json.loads(file.read(length))
    ends = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    return {name: (8 + length + begin, 8 + length + end) for name, (begin, end) in ends.items()}


def create(
    folder: Path,
    tensors: Mapping[str, Callable[[], Any]],
    config: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    *,
    single: str = SINGLE,
    config_name: str = "config.json",
) -> None:
    """Writes a new folder of tensors, each made by its function, and a config. It appears whole or not at all.

    The names are those of the file if there is only one, and of the config.
    """
    require(
        not folder.exists(), "A checkpoint must be written to a new folder.", f"{folder}, which exists", "use another."
    )
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    make_folder(folder.parent)
    partial.mkdir()
    try:
        _write_json(partial / config_name, config)
        shards: list[list[str]] = []  # names of tensors
        total = 0
        for shard in _shards(tensors, shard_bytes):
            path = partial / f"shard-{len(shards)}"
            safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
            shutil.copymode(partial / config_name, path)  # which is as the umask says; safetensors makes it private
            shards.append(list(shard))
            total += path.stat().st_size
        count = len(shards)
        names = [single] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            (partial / f"shard-{i}").rename(partial / name)
        if count > 1:
            weight_map = {tensor: name for shard, name in zip(shards, names) for tensor in shard}
            _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for path in (*partial.iterdir(), partial):
            sync(path)
        os.replace(partial, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _shards(tensors: Mapping[str, Callable[[], Any]], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    shard, size = {}, 0
    for name, make in tensors.items():
        array = np.ascontiguousarray(make())
        if shard and size + array.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def update(folder: Path, files: Mapping[str, Path], tensors: Mapping[str, Callable[[], Any]], *, tidy: bool) -> None:
    """Overwrites some tensors. Everything else stays as it is, byte for byte.

    Whenever this is interrupted, the folder holds the old checkpoint or the new one, and perhaps files that nothing
    names. `tidy` removes such files first. They must not be those of another update that is under way.
    This folder's README says in which order the files are written.
    The functions in `tensors` make the new arrays, in the shapes and dtypes of the files.
    """
    if tidy:
        _remove_unnamed(folder)
    changed = sorted({files[name] for name in tensors})
    fresh = {path: path.with_name(f"{_stem(path)}-update-{uuid.uuid4().hex[:8]}.safetensors") for path in changed}
    fresh_index = folder / f".{INDEX}.{uuid.uuid4().hex[:8]}"
    try:
        for path in changed:
            _rewrite(path, fresh[path], {name: tensors[name] for name in tensors if files[name] == path})
        if len(changed) > 1:
            index = read_json(folder / INDEX)
            index["weight_map"] = {
                name: fresh[folder / file].name if folder / file in fresh else file
                for name, file in index["weight_map"].items()
            }
            _write_json(fresh_index, index)
            _make_alike(fresh_index, folder / INDEX)
            sync(fresh_index)
        sync(folder)
    except BaseException:
        for path in (*fresh.values(), fresh_index):
            path.unlink(missing_ok=True)
        raise
    # The replacement is outside of `try`: once it is made, the folder names the fresh files, and they must stay.
    if len(changed) == 1:
        os.replace(fresh[changed[0]], changed[0])
        sync(folder)
    else:
        os.replace(fresh_index, folder / INDEX)
        sync(folder)
        for path in changed:
            path.unlink()


def _stem(path: Path) -> str:
    """The file's name without its ending, and without what an earlier update has put behind it."""
    return UPDATED.sub("", path.stem)


def _remove_unnamed(folder: Path) -> None:
    """Removes what killed updates have left: new files that were not named yet, or old ones that are not any more."""
    named = set(list_files(folder).values())
    stems, replaced = {_stem(path) for path in named}, {_stem(path) for path in named if UPDATED.search(path.stem)}

    def is_left(path):
        return _stem(path) in (stems if UPDATED.search(path.stem) else replaced)

    unnamed = [path for path in folder.glob("*.safetensors") if path not in named and is_left(path)]
    unnamed += [path for path in folder.glob(f".{INDEX}.*") if re.fullmatch(r"\.[0-9a-f]{8}", path.suffix)]
    if unnamed:
        sync(folder)  # The killed update may not have come to this: else a power cut could bring its old index back.
    for path in unnamed:
        path.unlink()


def _rewrite(path: Path, fresh: Path, tensors: Mapping[str, Any]) -> None:
    fresh.touch(mode=0o600)  # the old file may be private
    shutil.copyfile(path, fresh)
    with fresh.open("r+b") as file:
        places = _places(file)
        for name, array in tensors.items():
            file.seek(places[name][0])
            file.write(np.ascontiguousarray(array()).reshape(-1).view(np.uint8).data)
        file.flush()
        _make_alike(fresh, path)
        os.fsync(file.fileno())


def _make_alike(fresh: Path, old: Path) -> None:
    """Gives a file the mode of an old one and, where this user may do that, its owner and group."""
    status = old.stat()
    for owner, group in ((status.st_uid, status.st_gid), (-1, status.st_gid)):
        with contextlib.suppress(OSError):
            os.chown(fresh, owner, group)
            break
    shutil.copymode(old, fresh)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
