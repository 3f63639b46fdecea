"""A crash at any moment, the power cut included, leaves the old checkpoint or the new one: never none, never a mixture.

`support/disk.py` is the model of a disk that forgets what was not synced.
"""

import functools
import json
import shutil

import numpy as np
import pytest

from gemma_mlp import checkpoint, layouts
from gemma_mlp.checkpoint import safetensors_folder
from tests.support.by_hand import CONFIG, D, F, arrays, params
from tests.support.disk import check_every_crash
from tests.support.huggingface_folder import killed_after_the_rename, load, write

NEW = arrays()[::-1]


def read_folder(folder):
    """Every tensor and the config, as the package finds them; None if there is no such folder."""
    if not folder.exists():
        return None
    files = safetensors_folder.list_files(folder)
    tensors = {name: safetensors_folder.read_tensor(path, name).tobytes() for name, path in files.items()}
    return tensors | {"config.json": safetensors_folder.read_json(folder / "config.json")}


def check(tmp_path, write, name=".", read=read_folder):
    """`name` is that of the checkpoint's folder below the one that is watched."""
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)

    def read_state(state):
        return read(state / name)

    old = read_state(root)
    copy = tmp_path / "copy"  # in which the writer tells what the new checkpoint is
    shutil.copytree(root, copy)
    write(copy / name)
    check_every_crash(root, tmp_path / "states", lambda: write(root / name), read_state, old, read_state(copy))


@pytest.mark.parametrize("shard_bytes", [10**9, 500], ids=["one file", "shards"])
@pytest.mark.parametrize("name", ["new", "models/gemma/new"])
def test_a_new_folder(tmp_path, name, shard_bytes):
    """Also below folders that are not there yet."""
    make = functools.partial(checkpoint.write_huggingface, params=params(arrays()), config=CONFIG)
    check(tmp_path, lambda folder: make(folder, shard_bytes=shard_bytes), name)


@pytest.mark.parametrize("layers", [range(5), [2]], ids=["all layers", "one layer"])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_update_in_place(tmp_path, shards, layers):
    """One layer is in one of the shards, which keeps its name."""
    write(tmp_path / "root", arrays(), shards)
    new = [params(NEW)[0]] if len(layers) == 1 else params(NEW)
    check(tmp_path, lambda folder: checkpoint.update_huggingface(folder, new, layers=layers))


def test_an_update_of_a_file_with_an_index(tmp_path):
    folder = write(tmp_path / "root", arrays())
    index = {"metadata": {}, "weight_map": dict.fromkeys(load(folder), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check(tmp_path, lambda folder: checkpoint.update_huggingface(folder, params(NEW)))


def test_a_second_update(tmp_path):
    """It starts from the names that the first one has made."""
    checkpoint.update_huggingface(write(tmp_path / "root", arrays(), 3), params(NEW))
    check(tmp_path, lambda folder: checkpoint.update_huggingface(folder, params(arrays())))


def test_an_update_after_a_killed_one(tmp_path):
    """The first was killed when the new names were in place and not yet on the disk. Its old files are still needed."""
    write(tmp_path / "root", arrays(), 3)

    def write_twice(folder):
        with killed_after_the_rename():
            checkpoint.update_huggingface(folder, params(NEW))
        checkpoint.update_huggingface(folder, params(NEW))

    check(tmp_path, write_twice)


def test_new_adapters(tmp_path):
    adapter = layouts.Adapter(np.ones((D, 2), np.float32), np.full((2, F), 3, np.float32))

    def read(folder):
        if not folder.exists():
            return None
        ((number, of_layer),) = checkpoint.read_adapters(folder).items()
        return number, {name: (a.tobytes(), b.tobytes(), factor) for name, (a, b, factor) in of_layer.items()}

    check(tmp_path, lambda folder: checkpoint.write_adapters(folder, {1: {"up_proj": adapter}}), "new", read)
