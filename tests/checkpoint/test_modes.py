"""New files and folders have the modes that the umask says. An update keeps the old file's mode and owner."""

import os
import stat

import pytest

from gemma_mlp import checkpoint, layouts
from tests.support.by_hand import CONFIG, arrays, equal, params
from tests.support.huggingface_folder import write

pytestmark = [
    pytest.mark.promotes,  # Orbax relies on promotion
    pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's"),
]
LAYERS = params(arrays())


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("form", ["one file", "shards", "orbax"])
def test_new_files_and_folders(tmp_path, umask, form):
    folder = tmp_path / "parent" / "new"
    if form == "orbax":
        checkpoint.write_orbax(folder, LAYERS, layouts.tunix(CONFIG))
    else:
        checkpoint.write_huggingface(folder, LAYERS, CONFIG, shard_bytes=500 if form == "shards" else 10**9)
    for path in (folder.parent, folder, *folder.rglob("*")):
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("old", [0o664, 0o644, 0o600, 0o440], ids=oct)
def test_an_update_keeps_modes(tmp_path, umask, old, shards):
    folder = write(tmp_path / "c", arrays(), shards)
    for path in folder.iterdir():
        path.chmod(old)
    checkpoint.update_huggingface(folder, LAYERS[::-1])
    assert {mode(path) for path in folder.iterdir()} == {old}
    assert equal(checkpoint.read_huggingface(folder), LAYERS[::-1])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("may", ["all", "the group", "nothing"])
def test_an_update_keeps_the_owner_where_it_can(tmp_path, monkeypatch, shards, may):
    """Only root may give files away, so the system's answers are made up here."""
    folder = write(tmp_path / "c", arrays(), shards)
    owner = (folder.stat().st_uid, folder.stat().st_gid)
    given = {}

    def chown(path, uid, gid):
        if may == "nothing" or (may == "the group" and uid != -1):
            raise PermissionError("Operation not permitted")
        assert mode(path) == (0o600 if path.suffix == ".safetensors" else mode(path))  # private until it is given away
        given[path.name] = (uid, gid)

    monkeypatch.setattr(os, "chown", chown)
    checkpoint.update_huggingface(folder, LAYERS[::-1])
    assert equal(checkpoint.read_huggingface(folder), LAYERS[::-1])
    expected = {"all": owner, "the group": (-1, owner[1])}
    assert len(given) == (0 if may == "nothing" else 1 if shards == 1 else shards + 1)
    assert all(value == expected[may] for value in given.values())


def test_an_update_by_root_keeps_the_owner(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    folder = write(tmp_path / "c", arrays(), 3)
    for path in folder.iterdir():
        os.chown(path, 12345, 54321)
    checkpoint.update_huggingface(folder, LAYERS[::-1])
    assert {(path.stat().st_uid, path.stat().st_gid) for path in folder.iterdir()} == {(12345, 54321)}
