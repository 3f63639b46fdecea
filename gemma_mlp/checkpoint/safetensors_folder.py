"""Folders of safetensors files as Hugging Face writes them: one file, or shards and an index."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from gemma_mlp.checks import require, require_new

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # as Hugging Face cuts them

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # others by their own names


class Header(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: if the file is not there or is not one.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is a JSON file. Received: {error}. Fix: give the checkpoint's own folder.") from error
    require(isinstance(value, dict), f"{path} holds a JSON object.", type(value).__name__, "download it again.")
    return value


def list_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, by the tensor's name.

    Raises:
      ValueError: if there is no file, an index that cannot be read, or one that names what is not in the folder.
    """
    present = [name for name in (SINGLE, INDEX) if (folder / name).exists()]
    require(
        len(present) == 1,
        f"{folder} holds either {SINGLE} or {INDEX}.",
        " and ".join(present or sorted(path.name for path in folder.glob("*"))[:5]) or "nothing",
        "remove the stale one; files in other formats (.bin, .pt) are pickles, which are never opened.",
    )
    if present == [SINGLE]:
        return dict.fromkeys(read_headers(folder / SINGLE), folder / SINGLE)
    names = read_json(folder / INDEX).get("weight_map")
    require(
        isinstance(names, dict) and bool(names) and all(isinstance(name, str) for name in names.values()),
        f"{folder / INDEX} has a weight_map of tensors' names to files' names.",
        repr(names)[:100],
        "download it again.",
    )
    assert isinstance(names, dict)
    for tensor, name in names.items():
        # Links inside the folder may lead anywhere: the hub's cache is made of them, and they are the user's own.
        require(
            PurePosixPath(name).parts == (name,) and name not in (".", "..") and name.endswith(".safetensors"),
            f"{folder / INDEX} names safetensors files in its own folder.",
            f"{name!r} for {tensor}",
            "do not load this checkpoint: such a path escapes the folder or is a pickle.",
        )
        require(
            (folder / name).is_file(),
            f"{tensor} is in {folder / name}, as the index says.",
            "no such file",
            "download the missing shard.",
        )
    return {tensor: folder / name for tensor, name in names.items()}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it is a ValueError that names it."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError, OverflowError) as error:
        raise ValueError(
            f"{path} is a whole safetensors file. Received: {error}. Fix: download it again; it may be cut short."
        ) from error


def read_headers(path: Path) -> dict[str, Header]:
    """What the file holds."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Header(tuple(part.get_shape()), DTYPES.get(str(part.get_dtype()), str(part.get_dtype())))
            for name, part in slices.items()
        }


def create(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], config: Mapping[str, Any], shard_bytes: int
) -> None:
    """Writes a new folder, whole or not at all."""
    require_new(folder)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        shards: list[dict[str, Path]] = []
        for shard in _shards(tensors, shard_bytes):
            path = partial / f"shard-{len(shards)}"
            safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
            shards.append(dict.fromkeys(shard, path))
        total = sum(path.stat().st_size for shard in shards for path in set(shard.values()))
        names = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        )
        for shard, name in zip(shards, names):
            next(iter(shard.values())).rename(partial / name)
        if len(shards) > 1:
            weight_map = {tensor: name for shard, name in zip(shards, names) for tensor in shard}
            _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(partial / "config.json", config)
        for path in partial.iterdir():
            _sync(path)
        partial.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _shards(tensors, shard_bytes):
    shard, size = {}, 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def update(folder: Path, files: Mapping[str, Path], tensors: Mapping[str, Any]) -> None:
    """Puts new bytes in the place of some tensors' old ones; all else stays as it is, byte for byte.

    Every changed file is written beside the old one. One changed file then takes the old one's name. Several keep names
    of their own, and the index that names them takes the old index's: whenever this is cut short, the folder holds the
    old checkpoint or the new, and perhaps files that nothing names.

    Args:
      folder: a checkpoint.
      files: of its tensors, by name.
      tensors: by name, functions that give the array, of the shape and dtype that the file says.
    """
    changed = sorted({files[name] for name in tensors})
    fresh = {path: path.with_name(f"{_stem(path)}-{uuid.uuid4().hex[:8]}.safetensors") for path in changed}
    try:
        for path in changed:
            _rewrite(path, fresh[path], {name: tensors[name] for name in tensors if files[name] == path})
        if len(changed) == 1:
            os.replace(fresh[changed[0]], changed[0])
        else:
            index = read_json(folder / INDEX)
            index["weight_map"] = {
                name: fresh[folder / file].name if folder / file in fresh else file
                for name, file in index["weight_map"].items()
            }
            partial = folder / f".{INDEX}.{uuid.uuid4().hex[:8]}"
            _write_json(partial, index)
            _sync(partial)
            os.replace(partial, folder / INDEX)
    except BaseException:
        for path in fresh.values():
            path.unlink(missing_ok=True)
        raise
    _sync(folder)
    if len(changed) > 1:
        for path in changed:
            path.unlink()


def _rewrite(path: Path, fresh: Path, tensors: Mapping[str, Any]) -> None:
    shutil.copyfile(path, fresh)
    with fresh.open("r+b") as file:
        # The one thing that safetensors does not tell: where a tensor begins. Eight bytes of length, then JSON.
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, array in tensors.items():
            file.seek(8 + length + header[name]["data_offsets"][0])
            file.write(np.ascontiguousarray(array()).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _stem(path: Path) -> str:
    return re.sub(r"-[0-9a-f]{8}$", "", path.stem)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
