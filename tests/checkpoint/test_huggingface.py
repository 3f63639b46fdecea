"""Hugging Face folders are compared with files that safetensors wrote from arrays transposed by hand."""

import fcntl
import json
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gemma_mlp import MLPConfig, checkpoint, disk, layouts
from gemma_mlp.checkpoint import loading, safetensors_folder
from tests.support.by_hand import CONFIG, GEMMA1, LAYERS, D, F, arrays, equal, huggingface, params
from tests.support.huggingface_folder import SETTINGS, Killed, killed_after_the_rename, load, others, save, write


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_layer(tmp_path, shards):
    folder = write(tmp_path, arrays(), shards)
    assert equal(checkpoint.read_huggingface(folder), params(arrays()))
    assert equal(checkpoint.read_huggingface(str(folder), layers=[4, 0]), [params(arrays())[i] for i in (4, 0)])
    assert equal(checkpoint.read_huggingface(folder, layers=range(2, 4)), params(arrays())[2:4])


@pytest.mark.parametrize("shards", [1, 3])
def test_stacks_for_scan(tmp_path, shards):
    folder = write(tmp_path, arrays(), shards)
    assert equal(checkpoint.read_huggingface(folder, stacked=True), layouts.stack(params(arrays())))
    chosen = checkpoint.read_huggingface(folder, layers=[3, 1], stacked=True)
    assert equal(chosen, layouts.stack([params(arrays())[3], params(arrays())[1]]))


VAULT = {"pre_feedforward_layernorm": "pre_norm"}


@pytest.mark.parametrize("stacked", [False, True])
def test_vaultgemma_has_the_later_name_of_the_norm_and_no_post_norm(tmp_path, stacked):
    layers = arrays(GEMMA1)
    save(tmp_path / "model.safetensors", huggingface(layers, VAULT))
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"model_type": "vaultgemma"}))
    expected = layouts.stack(params(layers)) if stacked else params(layers)
    assert equal(checkpoint.read_huggingface(tmp_path, stacked=stacked), expected)
    checkpoint.update_huggingface(tmp_path, params(layers)[::-1])
    assert equal(load(tmp_path), huggingface(layers[::-1], VAULT))


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_each_part_of_an_encoder_decoder(tmp_path, name):
    """The parts may differ in size. Reading and writing one leaves the other as it is."""
    parts = {"encoder": (CONFIG, arrays()), "decoder": (MLPConfig(D, 2 * F), arrays(MLPConfig(D, 2 * F), 3))}
    tensors, said = {}, {}
    for part, (config, layers) in parts.items():
        tensors |= {key.replace("model.", f"model.{part}."): value for key, value in huggingface(layers).items()}
        said[part] = {"hidden_size": D, "intermediate_size": config.hidden_dim, "num_hidden_layers": len(layers)}
    if name == "t5gemma2":
        said["encoder"] = {"text_config": said["encoder"]}
    save(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name} | said))
    for part, (config, layers) in parts.items():
        assert checkpoint.read_config(tmp_path, part=part) == (config, len(layers))
        assert equal(checkpoint.read_huggingface(tmp_path, part=part), params(layers))
        assert len(checkpoint.huggingface_shapes(tmp_path, part=part)) == len(layers)
    with pytest.raises(ValueError, match="part must be 'encoder' or 'decoder'"):
        checkpoint.read_huggingface(tmp_path)
    checkpoint.update_huggingface(tmp_path, params(arrays())[::-1], part="encoder")
    assert equal(checkpoint.read_huggingface(tmp_path, part="encoder"), params(arrays())[::-1])
    assert equal(checkpoint.read_huggingface(tmp_path, part="decoder"), params(parts["decoder"][1]))


def test_plain_weights_in_a_folder_that_speaks_of_quantisation_are_read(tmp_path):
    """As where only the attention is quantised."""
    folder = write(tmp_path, arrays(), settings=SETTINGS | {"quantization_config": {"quant_method": "gptq"}})
    assert equal(checkpoint.read_huggingface(folder), params(arrays()))


def test_casts(tmp_path):
    layers = arrays(dtype=np.float32)
    layers[0]["gate_proj"][0, 0] = 1 + 2**-9  # rounds to 1 in bfloat16
    folder = write(tmp_path, layers)
    got = checkpoint.read_huggingface(folder, dtype="bfloat16", stacked=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {"bfloat16"}
    assert got.mlp.gate_proj[0, 0, 0] == 1
    assert equal(checkpoint.read_huggingface(folder), params(layers))
    with pytest.raises(ValueError, match="64-bit mode"):
        checkpoint.read_huggingface(folder, dtype="float64")
    with pytest.raises(ValueError, match="must not be float16"):
        checkpoint.read_huggingface(folder, dtype="float16")


def test_stacks_on_a_device_with_memory_of_its_own(tmp_path, monkeypatch):
    """As on a GPU or a TPU: the stack is made of zeros, and each layer overwrites its place."""
    monkeypatch.setattr(loading, "_new_stack", lambda shape, dtype, device: jnp.zeros(shape, dtype, device=device))
    folder = write(tmp_path / "m", arrays(), shards=3)
    assert equal(checkpoint.read_huggingface(folder, stacked=True), layouts.stack(params(arrays())))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stack_on_a_cpu_is_the_memory_that_was_filled(dtype):
    device = jax.local_devices(backend="cpu")[0]
    memory = loading._new_stack((3, 5, 7), jnp.dtype(dtype), device)
    stack = jax.device_put(memory, device, may_alias=True)
    assert stack.unsafe_buffer_pointer() == memory.ctypes.data and stack.dtype == dtype


def test_onto_a_device(tmp_path):
    device = jax.devices()[-1]
    got = checkpoint.read_huggingface(write(tmp_path, arrays()), shardings=device)
    assert {leaf.device for leaf in jax.tree.leaves(got)} == {device}


def test_files_of_other_layers_are_not_opened(tmp_path):
    folder = write(tmp_path, arrays(), shards=LAYERS)
    for number in (0, 2, 3, 4):
        (folder / f"model-{number + 1:05}-of-{LAYERS:05}.safetensors").write_bytes(b"broken")
    assert equal(checkpoint.read_huggingface(folder, layers=[1]), params(arrays())[1:2])
    with pytest.raises(ValueError, match="model-00003-of-00005"):
        checkpoint.read_huggingface(folder, layers=[2])


@pytest.mark.parametrize("options", [{}, {"stacked": True}, {"dtype": "float32"}])
def test_files_of_other_layers_need_not_be_there(tmp_path, options):
    folder = write(tmp_path, arrays(), shards=LAYERS)
    for number in (0, 2, 4):
        (folder / f"model-{number + 1:05}-of-{LAYERS:05}.safetensors").unlink()
    whole = write(tmp_path / "whole", arrays())
    expected = checkpoint.read_huggingface(whole, layers=[3, 1], **options)
    assert equal(checkpoint.read_huggingface(folder, layers=[3, 1], **options), expected)
    with pytest.raises(ValueError, match=r"model-00003-of-00005.*no such file.*download the missing shard"):
        checkpoint.read_huggingface(folder, layers=[1, 2], **options)


def test_layers_of_a_partial_download_are_updated(tmp_path):
    folder = write(tmp_path, arrays(), shards=LAYERS)
    (folder / "model-00003-of-00005.safetensors").unlink()
    checkpoint.update_huggingface(folder, params(arrays())[:2], layers=[3, 1])
    assert equal(checkpoint.read_huggingface(folder, layers=[3, 1]), params(arrays())[:2])
    with pytest.raises(ValueError, match="download the missing shard"):
        checkpoint.update_huggingface(folder, params(arrays()))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_file_and_an_index_that_agree_are_one_checkpoint(tmp_path, stacked):
    """mlx-lm writes an index to its single file."""
    folder = write(tmp_path, arrays())
    index = {"metadata": {}, "weight_map": dict.fromkeys(load(folder), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = layouts.stack(params(arrays())) if stacked else params(arrays())
    assert equal(checkpoint.read_huggingface(folder, stacked=stacked), expected)
    checkpoint.update_huggingface(folder, params(arrays())[::-1])
    assert equal(checkpoint.read_huggingface(folder), params(arrays())[::-1])


def test_no_other_tensor_is_read(tmp_path, monkeypatch):
    asked = []

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = OPEN(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            part = self.file.get_slice(name)
            return SpySlice(name, part)

    class SpySlice:
        def __init__(self, name, part):
            self.name, self.get_shape, self.get_dtype, self.part = name, part.get_shape, part.get_dtype, part

        def __getitem__(self, index):
            asked.append(self.name)
            return self.part[index]

    OPEN = safetensors.safe_open
    folder = write(tmp_path, arrays())
    monkeypatch.setattr(safetensors, "safe_open", Spy)
    checkpoint.read_huggingface(folder, layers=[3])
    assert sorted(asked) == sorted(name for name in huggingface(arrays()) if ".layers.3." in name)


@pytest.mark.parametrize("shards", [1, 3])
def test_updates_in_place_and_leaves_the_rest(tmp_path, shards):
    folder = write(tmp_path, arrays(), shards)
    changed = arrays()[::-1]
    checkpoint.update_huggingface(folder, params(changed))
    expected = huggingface(changed) | others(LAYERS)
    assert equal(load(folder), expected)
    assert json.loads((folder / "config.json").read_text()) == SETTINGS
    assert (folder / "tokenizer.json").exists()
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt", "note": "kept"}
    assert len(list(folder.glob("*.safetensors"))) == shards
    assert equal(checkpoint.read_huggingface(folder), params(changed))


def test_updates_one_layer(tmp_path):
    folder = write(tmp_path, arrays(), 3)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    checkpoint.update_huggingface(folder, params(arrays())[:1], layers=[2])
    assert {path.name for path, old in before.items() if path.read_bytes() != old} == {
        "model-00003-of-00003.safetensors"
    }
    layers = arrays()
    layers[2] = layers[0]
    assert equal(checkpoint.read_huggingface(folder), params(layers))


def test_an_update_that_does_not_fit_changes_nothing(tmp_path):
    folder = write(tmp_path, arrays(), 3)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    good = params(arrays())
    nan = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), good[0])
    wide = jax.tree.map(lambda leaf: leaf.astype("float32"), good[0])
    for bad, layers, message in (
        (good[:2], None, r"parameters for 5 layers\. \w+: parameters for 2"),
        ([wide], [0], r"model\.layers\.0\..* must be bfloat16.*\. \w+: float32.*astype"),
        ([nan], [0], "of layer 0 must be finite"),
        ([layouts.stack(good)], [0], "Every layer must have the shapes"),
        ([good[0]], [5], "layers 0 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.update_huggingface(folder, bad, layers=layers)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


WRITE_TEXT, COPYFILE, CLOSE = safetensors_folder.Path.write_text, shutil.copyfile, os.close


@pytest.mark.parametrize("shards", [1, 3])
def test_an_update_cut_short_leaves_the_old_or_the_new(tmp_path, monkeypatch, shards):
    """The update is killed at each call that touches the disk. The folder is then whole, and old or new."""
    new = arrays()[::-1]
    for survived in range(100):
        folder = write(tmp_path / str(survived), arrays(), shards)
        calls = []

        def counted(function):
            def call(*args, **kwargs):
                if len(calls) >= survived:
                    if function is WRITE_TEXT:  # write half of it
                        WRITE_TEXT(args[0], args[1][: len(args[1]) // 2])
                    if function is COPYFILE:
                        whole = args[0].read_bytes()
                        args[1].write_bytes(whole[: len(whole) // 2])
                    if function is CLOSE:  # as the operating system does, which also gives up the lock
                        CLOSE(*args)
                    raise Killed
                calls.append(function)
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((shutil, "copyfile"), (os, "fsync"), (os, "replace"), (os, "close")):
                patch.setattr(module, name, counted(getattr(module, name)))
            for name in ("write_text", "unlink", "rename"):
                patch.setattr(safetensors_folder.Path, name, counted(getattr(safetensors_folder.Path, name)))
            try:
                checkpoint.update_huggingface(folder, params(new))
                break
            except Killed:
                pass
        got = checkpoint.read_huggingface(folder)
        assert equal(got, params(arrays())) or equal(got, params(new))
        files = safetensors_folder.list_files(folder)  # without half-written files, which nothing names
        read = {name: safetensors.numpy.load_file(files[name])[name] for name in others(LAYERS)}
        assert equal(read, others(LAYERS))
        checkpoint.update_huggingface(folder, params(new))
        check_updated(folder, new, shards)
    assert 4 < survived < 100
    check_updated(folder, new, shards)


def check_updated(folder, new, shards):
    """The folder holds the new parameters and all other tensors, and no file that nothing names."""
    assert equal(checkpoint.read_huggingface(folder), params(new))
    tensors = load(folder)
    assert equal({name: tensors[name] for name in others(LAYERS)}, others(LAYERS))
    names = {path.name for path in folder.iterdir()} - {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert names == {path.name for path in safetensors_folder.list_files(folder).values()} and len(names) == shards


@pytest.mark.parametrize("shards", [1, 3])
def test_an_update_killed_right_after_the_rename_leaves_the_new(tmp_path, shards):
    folder, new = write(tmp_path, arrays(), shards), arrays()[::-1]
    with killed_after_the_rename():
        checkpoint.update_huggingface(folder, params(new))
    assert equal(checkpoint.read_huggingface(folder), params(new))
    files = safetensors_folder.list_files(folder)
    assert equal({name: safetensors.numpy.load_file(files[name])[name] for name in others(LAYERS)}, others(LAYERS))
    checkpoint.update_huggingface(folder, params(arrays()))
    check_updated(folder, arrays(), shards)


FOREIGN = (  # no update makes such names in a folder of the shards model-00001-of-00003 and so on
    "model-00001-of-00003-copy.safetensors",
    "model-00001-of-00003-20261127.safetensors",
    "model-00001-of-00003-update-0123abcd.safetensors.old",
    "adapter-update-0123abcd.safetensors",
    ".model.safetensors.index.json.backup",
)


def test_an_update_removes_no_files_but_those_of_killed_updates(tmp_path):
    folder = write(tmp_path, arrays(), 3)
    left = [
        folder / name
        for name in ("model-00002-of-00003-update-0123abcd.safetensors", f".{safetensors_folder.INDEX}.0123abcd")
    ]
    for path in (*left, *(folder / name for name in FOREIGN)):
        path.write_bytes(b"not a checkpoint")
    checkpoint.update_huggingface(folder, params(arrays())[:1], layers=[2])
    assert not any(path.exists() for path in left)
    assert all((folder / name).read_bytes() == b"not a checkpoint" for name in FOREIGN)


def test_two_updates_at_once_wait_for_each_other(tmp_path):
    """Else the second would remove what the first has written, or read files that the first then replaces."""
    folder = write(tmp_path, arrays(), 3)
    under_way = folder / "model-00001-of-00003-update-0123abcd.safetensors"
    under_way.write_bytes(b"half")
    second = threading.Thread(target=checkpoint.update_huggingface, args=(folder, params(arrays()[::-1])))
    with disk.locked(folder) as has_lock:
        assert has_lock
        second.start()
        second.join(0.5)
        assert second.is_alive() and under_way.exists()
        assert equal(checkpoint.read_huggingface(folder), params(arrays()))
        index = folder / safetensors_folder.INDEX
        index.write_text(index.read_text().replace("model-00001-of", "new-00001-of"))
        (folder / "model-00001-of-00003.safetensors").rename(folder / "new-00001-of-00003.safetensors")
        under_way.unlink()
    second.join(60)
    check_updated(folder, arrays()[::-1], 3)


def test_a_disk_without_locks_keeps_what_may_be_of_another_update(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError("no locks")

    folder = write(tmp_path, arrays(), 3)
    other = folder / "model-00001-of-00003-update-0123abcd.safetensors"
    other.write_bytes(b"half")
    monkeypatch.setattr(fcntl, "flock", flock)
    checkpoint.update_huggingface(folder, params(arrays()[::-1]))
    assert other.exists() and equal(checkpoint.read_huggingface(folder), params(arrays()[::-1]))


def test_a_new_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Its files and then the folder itself are flushed; it is renamed; the folder around it is flushed."""
    calls = []  # numbers of inodes, which a renamed file keeps
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    folder = tmp_path / "new"
    checkpoint.write_huggingface(folder, params(arrays()), CONFIG, shard_bytes=500)
    inode = lambda path: path.stat().st_ino  # noqa: E731
    assert len(list(folder.iterdir())) == 4  # config.json, the index and two shards
    assert set(calls[:4]) == set(map(inode, folder.iterdir()))
    assert calls[4:] == [inode(folder), "replace", inode(tmp_path)]


@pytest.mark.parametrize("shards", [1, 3])
def test_all_files_of_an_update_are_on_the_disk_before_one_gets_its_name(tmp_path, monkeypatch, shards):
    """Each new file, the index among them, is flushed whole, and then the folder. Nothing is renamed before."""
    folder = write(tmp_path / "c", arrays(), shards)
    calls = []  # (inode, size) of what is flushed
    fsync, replace = os.fsync, os.replace

    def status(file):
        return os.fstat(file).st_ino, os.fstat(file).st_size

    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(status(file)), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    checkpoint.update_huggingface(folder, params(arrays()[::-1]))
    names = ("*.safetensors", "*.index.json")
    new = {(path.stat().st_ino, path.stat().st_size) for name in names for path in folder.glob(name)}
    flushed = calls[: calls.index("replace")]
    assert len(new) == (1 if shards == 1 else shards + 1) and set(flushed[:-1]) == new
    inodes = [call[0] for call in (flushed[-1], *calls[len(flushed) + 1 :])]
    assert inodes == [folder.stat().st_ino] * 2  # before the renaming, and after it


@pytest.mark.parametrize("shards", [1, 3])
def test_names_of_files_do_not_grow_with_every_update(tmp_path, shards):
    folder = write(tmp_path, arrays(), shards)
    names = lambda: sorted(path.name for path in folder.glob("*.safetensors"))  # noqa: E731
    before = names()
    lengths = []
    for layers in (arrays()[::-1], arrays(), arrays()[::-1]):
        checkpoint.update_huggingface(folder, params(layers))
        assert equal(checkpoint.read_huggingface(folder), params(layers))
        lengths.append([len(name) for name in names()])
    assert lengths == [[len(name) + (0 if shards == 1 else len("-update-01234567")) for name in before]] * 3


def test_a_new_folder_cut_short_is_not_there(tmp_path, monkeypatch):
    for survived in range(100):
        folder, left = tmp_path / str(survived), [survived]

        def fsync(descriptor):
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                checkpoint.write_huggingface(folder, params(arrays()), MLPConfig(D, F))
                break
            except Killed:
                assert not folder.exists() or equal(checkpoint.read_huggingface(folder), params(arrays()))
    assert 1 < survived < 100


@pytest.mark.parametrize("shard_bytes", [10**9, 500])
@pytest.mark.parametrize("post_norm", [True, False])
def test_a_new_folder(tmp_path, post_norm, shard_bytes):
    config = MLPConfig(D, F, post_norm=post_norm, activation="silu", norm_eps=1e-5)
    layers = arrays(config)
    checkpoint.write_huggingface(tmp_path / "new", params(layers), config, shard_bytes=shard_bytes)
    assert checkpoint.read_config(tmp_path / "new") == (config, LAYERS)
    assert equal(checkpoint.read_huggingface(tmp_path / "new"), params(layers))
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == (1 if shard_bytes > 500 else 2)
    with pytest.raises(ValueError, match="must be written to a new folder"):
        checkpoint.write_huggingface(tmp_path / "new", params(layers), config)


def test_leaves_of_several_dtypes_keep_them(tmp_path):
    layers = [layer | {"pre_norm": layer["pre_norm"].astype(np.float32)} for layer in arrays()]
    checkpoint.write_huggingface(tmp_path / "new", params(layers), CONFIG)
    assert equal(checkpoint.read_huggingface(tmp_path / "new"), params(layers))


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own(tmp_path):
    checkpoint.write_huggingface(tmp_path / "new", params(arrays()), CONFIG, shard_bytes=10)  # norms take 8 bytes
    sizes = [len(safetensors.numpy.load_file(path)) for path in (tmp_path / "new").glob("*.safetensors")]
    assert sizes == [1] * (5 * LAYERS)
    assert equal(checkpoint.read_huggingface(tmp_path / "new"), params(arrays()))


@pytest.mark.parametrize(
    "config", [MLPConfig(D, F, activation="gelu", post_norm=False), MLPConfig(D, F, activation="sigmoid")]
)
def test_a_config_that_config_json_cannot_say_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match=r"config\.json can name"):
        checkpoint.write_huggingface(tmp_path / "new", params(arrays(config)), config)
    assert not (tmp_path / "new").exists()
