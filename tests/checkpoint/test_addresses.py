"""A URL is never taken for a path on this disk; `~` is the home folder wherever an address is given."""

import os
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from etils import epath

from gemma_mlp import checkpoint, layouts
from gemma_mlp.checkpoint import orbax
from tests.support.by_hand import CONFIG, arrays, equal, params
from tests.support.huggingface_folder import write

pytestmark = pytest.mark.promotes  # Orbax relies on promotion

LAYOUT = layouts.tunix(CONFIG)
READERS = {
    "read_config": checkpoint.read_config,
    "huggingface_shapes": checkpoint.huggingface_shapes,
    "read_huggingface": checkpoint.read_huggingface,
    "update_huggingface": lambda path: checkpoint.update_huggingface(path, params(arrays())),
}
ORBAX = {
    "read_orbax": lambda path: checkpoint.read_orbax(path, CONFIG),
    "orbax_shapes": lambda path: checkpoint.orbax_shapes(path, CONFIG),
    "write_orbax": lambda path: checkpoint.write_orbax(path, params(arrays()), LAYOUT),
}
WAYS_OUT = {  # address: the command in the error
    "gs://bucket/model": r"gcloud storage cp --recursive gs://bucket/model FOLDER",
    "s3://bucket/model": r"aws s3 cp --recursive s3://bucket/model FOLDER",
    "hf://google/gemma-2-2b": r"hf download google/gemma-2-2b --local-dir FOLDER",
    "https://huggingface.co/google/gemma-2-2b/tree/main": r"hf download google/gemma-2-2b --local-dir FOLDER",
    "https://example.com/model": r"download it to a folder first\.",
    "file:///data/model": r"give the path itself: /data/model\.",
    "google/gemma-2-2b": r"if it is a model's name on the hub, .*hf download google/gemma-2-2b --local-dir FOLDER",
}


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """Nothing may be written into the folder in which we are."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    yield
    assert not os.listdir(tmp_path / "empty")


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("address", WAYS_OUT)
def test_a_hugging_face_folder_is_on_this_disk(address, name, kind):
    with pytest.raises(ValueError, match=rf"must be a folder on this disk\. Got: .*{WAYS_OUT[address]}"):
        READERS[name](kind(address))


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("address", [address for address in WAYS_OUT if ":" in address])
def test_no_hugging_face_folder_is_written_to_a_url(address, kind):
    with pytest.raises(ValueError, match=r"must be a folder on this disk.*(and copy that|give the path itself)"):
        checkpoint.write_huggingface(kind(address), params(arrays()), CONFIG)


@pytest.mark.parametrize("name", ORBAX)
@pytest.mark.parametrize("address", ["s3://bucket/model", "https://a.b/c", "file:///data/c", Path("gs://bucket/c")])
def test_orbax_reads_no_other_url(address, name):
    with pytest.raises(
        ValueError, match=r"a path on this disk, or a gs:// URL as a string.*Got: .*copy it to this disk"
    ):
        ORBAX[name](address)


@pytest.mark.parametrize("name", ORBAX)
def test_a_bucket_is_left_to_orbax(monkeypatch, name):
    """It gets the URL whole. Here it answers that it has not the package for buckets, or not the right to look."""
    asked = []

    def exists(path):
        asked.append(str(path))
        raise PermissionError("no right to look")

    monkeypatch.setattr(epath.Path("gs://bucket/c").__class__, "exists", exists)
    with pytest.raises((ValueError, PermissionError), match="no right to look"):
        ORBAX[name]("gs://bucket/c")
    assert all(path.startswith("gs://bucket/c") for path in asked)


@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_tensor_in_a_bucket_is_read_by_the_driver_for_buckets(monkeypatch, ocdbt):
    opened = []
    monkeypatch.setattr(ocp.type_handlers, "is_ocdbt_checkpoint", lambda path: ocdbt)
    monkeypatch.setattr(orbax.tensorstore, "open", lambda spec, **options: opened.append(spec["kvstore"]))
    monkeypatch.setattr(orbax._Tensor, "_wait", lambda self, future: future)

    class Metadata:
        name, dtype, shape = "a.b", jnp.dtype("float32"), (2, 3)
        storage = type("Storage", (), {"chunk_shape": (2, 3)})

    orbax._Tensor(epath.Path("gs://bucket/run/4"), "a/b", Metadata)
    base = {"driver": "gcs", "bucket": "bucket", "path": "run/4/"}
    whole = {"driver": "ocdbt", "base": base, "path": "a.b/"} if ocdbt else base | {"path": "run/4/a.b/"}
    assert opened == [whole]


@pytest.mark.parametrize("kind", [str, Path])
def test_the_home_folder(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a", arrays())
    assert checkpoint.read_config(kind("~/a")).config == CONFIG
    checkpoint.update_huggingface(kind("~/a"), params(arrays())[::-1])
    assert equal(checkpoint.read_huggingface(kind("~/a")), params(arrays())[::-1])
    assert len(checkpoint.huggingface_shapes(kind("~/a"))) == 5
    checkpoint.write_huggingface(kind("~/b"), params(arrays()), CONFIG)
    checkpoint.write_orbax(kind("~/c"), params(arrays()), LAYOUT)
    assert equal(checkpoint.read_orbax(kind("~/c"), CONFIG), params(arrays()))
    assert len(checkpoint.orbax_shapes(kind("~/c"), CONFIG)) == 5
    assert {"a", "b", "c"} <= set(os.listdir(tmp_path))
