"""Hugging Face folders that are wrong in every way that we could think of, and headers that Hypothesis makes up."""

import json
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_mlp import checkpoint
from tests.support.by_hand import LAYERS, D, F, arrays, huggingface
from tests.support.huggingface_folder import SETTINGS, load, save, write

GATE, NORM = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.pre_feedforward_layernorm.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"  # holds layers 1 and 4


def single(change):
    """Changes the tensors of a one-file checkpoint."""

    def break_(folder):
        write(folder, arrays())
        tensors = load(folder)
        change(tensors)
        save(folder / "model.safetensors", tensors)

    return break_


def sharded(change):
    """Changes the files of a checkpoint in three shards."""

    def break_(folder):
        change(write(folder, arrays(), shards=3))

    return break_


def indexed(change):
    """Changes the index of a checkpoint in three shards."""

    def break_(folder):
        index = json.loads((write(folder, arrays(), shards=3) / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(index) or index))

    return break_


def configured(**change):
    return lambda folder: write(folder, arrays(), settings=SETTINGS | change)


def raw(make):
    """Replaces model.safetensors by made-up bytes."""

    def break_(folder):
        path = write(folder, arrays()) / "model.safetensors"
        path.write_bytes(make(path.read_bytes()))

    return break_


def replace(name, array):
    return single(lambda tensors: tensors.update({name: array}))


def filled(value):
    def change(tensors):
        tensors[GATE] = np.array(tensors[GATE])
        tensors[GATE][2, 1] = value

    return single(change)


def with_header(header):
    return raw(lambda old: struct.pack("<Q", len(header)) + header + old[8 + struct.unpack("<Q", old[:8])[0] :])


def pickled(folder):
    write(folder, arrays())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def both(folder):
    write(folder, arrays(), shards=3)
    write(folder, arrays())


def with_index(change):
    """A single file, and an index of it that was changed."""

    def break_(folder):
        names = dict.fromkeys(load(write(folder, arrays())), "model.safetensors")
        change(names)
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    return break_


def quantised(dtype, **change):
    def break_(folder):
        replace(GATE, np.zeros((F, 1), dtype))(folder)
        (folder / "config.json").write_text(json.dumps(SETTINGS | change))

    return break_


def adapted(folder):
    write(folder, arrays())
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "base_model_name_or_path": "google/gemma-2-2b"}
    (folder / "adapter_config.json").write_text(json.dumps(said))


SHAPE = rf"{GATE} in .*model\.safetensors must be \[{F}, {D}\] of bfloat16, float32, float64\. \w+: "
MALFORMED = {  # name: (what makes it, the error)
    "a missing tensor": (
        single(lambda tensors: tensors.pop(GATE)),
        SHAPE.replace(r".*model\.safetensors", ".*") + "no such",
    ),
    "a missing norm": (single(lambda tensors: tensors.pop(NORM)), rf"{NORM} in .* must be \[{D}\].*no such tensor"),
    "a missing layer": (
        single(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.4." in name]),
        r"layers\.4\.mlp\.gate_proj\.weight.*no such tensor",
    ),
    "a surplus bias": (
        replace("model.layers.0.mlp.up_proj.bias", np.zeros(F, "float32")),
        r"up_proj\.bias in",
    ),
    "a surplus layer": (configured(num_hidden_layers=4), r"in 4 layers. \w+: model\.layers\.4\."),
    "quantisation": (
        replace("model.layers.0.mlp.up_proj.weight_scale", np.ones(1, "float32")),
        "weight_scale.*quantised",
    ),
    "transposed": (replace(GATE, np.zeros((D, F), ml_dtypes.bfloat16)), SHAPE + r"bfloat16\[4, 6\]"),
    "of another width": (configured(intermediate_size=F + 1), r"must be \[7, 4\].*\w+: bfloat16\[6, 4\]"),
    "of rank 1": (replace(GATE, np.zeros(D * F, "float32")), SHAPE + r"float32\[24\]"),
    "of rank 3": (replace(GATE, np.zeros((1, F, D), "float32")), SHAPE + r"float32\[1, 6, 4\]"),
    "empty": (replace(GATE, np.zeros((0, D), "float32")), SHAPE + r"float32\[0, 4\]"),
    "float16": (
        replace(GATE, np.zeros((F, D), "float16")),
        rf"{GATE} in .*must be of bfloat16, float32, float64, or be cast.*\w+: float16\[6, 4\].*dtype=",
    ),
    "int8": (replace(GATE, np.zeros((F, D), "int8")), SHAPE + r"I8\[6, 4\]"),
    "float64": (replace(GATE, np.zeros((F, D))), "64-bit mode"),
    "NaN": (filled(np.nan), rf"{GATE} in .*model\.safetensors must be finite\. \w+: 1 numbers that are not, of 24"),
    "infinity": (filled(np.inf), rf"{GATE} .*must be finite"),
    "cut in the data": (raw(lambda old: old[:-1]), r"model\.safetensors must be a whole safetensors file.*cut short"),
    "cut in the header": (raw(lambda old: old[:40]), "must be a whole safetensors file"),
    "cut in the length": (raw(lambda old: old[:5]), "must be a whole safetensors file"),
    "no bytes": (raw(lambda old: b""), "must be a whole safetensors file"),
    "bytes at the end": (raw(lambda old: old + b"\0"), "must be a whole safetensors file"),
    "a header that is too long": (
        raw(lambda old: struct.pack("<Q", 2**63) + old[8:]),
        "must be a whole safetensors file",
    ),
    "a header that is no JSON": (with_header(b"{" * 64), "must be a whole safetensors file"),
    "a header of nothing": (with_header(b"{}"), "must be a whole safetensors file"),
    "offsets past the end": (
        with_header(json.dumps({GATE: {"dtype": "F32", "shape": [F, D], "data_offsets": [0, 2**40]}}).encode()),
        "must be a whole safetensors file",
    ),
    "a pickle": (raw(lambda old: b"\x80\x04\x95" + old), "must be a whole safetensors file"),
    "only a pickle": (pickled, r"must hold either .* \w+: config\.json and pytorch_model\.bin.*never opened"),
    "two forms": (
        both,
        r"must agree that the one file holds every tensor\. "
        r"\w+: model\.\S+, which is in model\.safetensors; the index says 'model-0000\d-of-00003\.safetensors'",
    ),
    "an index that lacks a tensor of the single file": (
        with_index(lambda names: names.pop(GATE)),
        rf"must agree.*{GATE}, which is in model\.safetensors; the index says None",
    ),
    "an index that names other files, too": (
        with_index(lambda names: names.update({"more": "model-2.safetensors"})),
        r"must agree.*more, which is not in model\.safetensors; the index says 'model-2\.safetensors'",
    ),
    "an index that has a tensor more than the single file": (
        with_index(lambda names: names.update({"more": "model.safetensors"})),
        r"must agree.*more, which is not in model\.safetensors; the index says 'model\.safetensors'",
    ),
    "an adapter": (
        lambda folder: adapted(folder),
        r"must hold a whole model\. Got: LORA adapters of google/gemma-2-2b, .*merge_and_unload",
    ),
    "GGUF": (
        lambda folder: (write(folder, arrays()) / "model.safetensors").rename(folder / "model.gguf"),
        r"must hold either .*model\.gguf.*read the GGUF file with read_gguf",
    ),
    "4 bits of bitsandbytes": (
        quantised("uint8", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"must hold plain weights\. Got: quantised ones, quant_method bitsandbytes, load_in_4bit True\..*dequantise",
    ),
    "4 bits of mlx": (
        quantised("uint32", quantization={"group_size": 64, "bits": 4}),
        r"must hold plain weights\. Got: quantised ones, group_size 64, bits 4\.",
    ),
    "an absent shard": (
        sharded(lambda folder: (folder / SHARD).unlink()),
        rf"layers\.1\.\S+ must be in .*{SHARD}, as the index says\. \w+: no such file\..*layers=",
    ),
    "a shard cut short": (
        sharded(lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-7])),
        f"{SHARD} must be a whole safetensors file",
    ),
    "a shard that is another": (
        sharded(lambda folder: shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder / SHARD)),
        rf"model\.layers\.1\.mlp\.gate_proj\.weight in .*{SHARD} must be .*no such tensor",
    ),
    "an index that is no JSON": (
        sharded(lambda folder: (folder / INDEX).write_text("{")),
        f"{INDEX} must be a JSON file",
    ),
    "an index that is a list": (sharded(lambda folder: (folder / INDEX).write_text("[]")), "must hold a JSON object"),
    "an index without a map": (indexed(lambda index: index.pop("weight_map") and None), "must have a weight_map"),
    "an index of numbers": (indexed(lambda index: {"weight_map": {GATE: 3}}), "must have a weight_map"),
    "an index that lacks a tensor": (
        indexed(lambda index: index["weight_map"].pop(GATE) and None),
        "no such tensor",
    ),
    "a path upwards": (
        indexed(lambda index: index["weight_map"].update({GATE: "../other/model.safetensors"})),
        rf"in its own folder. \w+: '\.\./other/model\.safetensors' for {GATE}.*escapes",
    ),
    "an absolute path": (indexed(lambda index: index["weight_map"].update({GATE: "/a.safetensors"})), "escapes"),
    "a path inside": (indexed(lambda index: index["weight_map"].update({GATE: "a/../b.safetensors"})), "escapes"),
    "a pickle in the index": (indexed(lambda index: index["weight_map"].update({GATE: "model.bin"})), "or is a pickle"),
    "no config": (sharded(lambda folder: (folder / "config.json").unlink()), r"config\.json must be a JSON file"),
    "a config that is no JSON": (
        sharded(lambda folder: (folder / "config.json").write_text("\0")),
        "must be a JSON file",
    ),
    "no folder": (lambda folder: None, r"absent/config\.json must be a JSON file.*No such file"),
    "two models": (
        single(lambda tensors: tensors.update({f"teacher.{name}": tensors[name] for name in list(tensors)})),
        r"must hold only one model.*of this kind. \w+: 2: model\., teacher\.model\.",
    ),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(tmp_path, name, stacked):
    break_, message = MALFORMED[name]
    folder = tmp_path / ("absent" if name == "no folder" else "checkpoint")
    break_(folder)
    before = {path: path.read_bytes() for path in folder.glob("*")}
    with pytest.raises(ValueError, match=message):
        checkpoint.read_huggingface(folder, stacked=stacked)
    assert {path: path.read_bytes() for path in folder.glob("*")} == before


def test_there_are_enough():
    assert len(MALFORMED) >= 25


@pytest.mark.parametrize("layers", [[5], [-1], [0, 0], [], range(3, 9)])
def test_a_layer_out_of_range(tmp_path, layers):
    with pytest.raises(ValueError, match=r"must name some of the layers 0 to 4, each once\. \w+: "):
        checkpoint.read_huggingface(write(tmp_path, arrays()), layers=layers)
    assert LAYERS == 5


# Headers that Hypothesis makes up


def parse(data):
    """The tensors of a file, read by NumPy: eight bytes of length, then JSON, then data."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    dtypes = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in dtypes:
            start, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(body[start:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def outcome(folder):
    """Checks that reading gives either our error or exactly what the file says, as it is and cast."""
    outcome_of(folder, None)
    outcome_of(folder, "float32")


def outcome_of(folder, dtype):
    try:
        layers = checkpoint.read_huggingface(folder, dtype=dtype)
    except ValueError:
        return
    tensors = parse((folder / "model.safetensors").read_bytes())
    for i, layer in enumerate(layers):
        for name, got in (
            ("mlp.gate_proj", layer.mlp.gate_proj.T),
            ("mlp.up_proj", layer.mlp.up_proj.T),
            ("mlp.down_proj", layer.mlp.down_proj.T),
            ("pre_feedforward_layernorm", layer.pre_norm.scale),
            ("post_feedforward_layernorm", layer.post_norm.scale),
        ):
            expected = tensors[f"model.layers.{i}.{name}.weight"]
            expected = expected if dtype is None else expected.astype(dtype)
            assert got.dtype == expected.dtype
            assert np.asarray(got).tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("fuzz"), arrays(layers=1), settings=SETTINGS | {"num_hidden_layers": 1})
    return folder, (folder / "model.safetensors").read_bytes()


FUZZ = settings(deadline=2000, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.sampled_from([*huggingface(arrays(layers=1)), "model.norm.weight", "", "__metadata__"])
SIZES = st.one_of(st.integers(-2, 100), st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 1.5, None, "4"]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F32", "F16", "F64", "I8", "F8_E4M3", "bfloat16", "", 3]),
        "shape": st.lists(SIZES, max_size=4),
        "data_offsets": st.lists(SIZES, max_size=3),
    }
)


@FUZZ
@given(position=st.integers(0, 1200), value=st.integers(0, 255))
def test_any_byte_changed(whole, position, value):
    folder, data = whole
    position %= len(data)
    (folder / "model.safetensors").write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
    outcome(folder)


@FUZZ
@given(length=st.one_of(st.integers(0, 2000), st.integers(0, 2**64 - 1)), header=st.binary(max_size=300))
def test_any_bytes_for_a_header(whole, length, header):
    folder, _ = whole
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header)
    outcome(folder)


@FUZZ
@given(entries=st.dictionaries(NAMES, ENTRIES, max_size=4), swap=st.permutations(range(5)))
def test_any_entries_in_a_header(whole, entries, swap):
    """The header is sound JSON, but has made-up entries, and the five tensors swap their offsets and shapes."""
    folder, data = whole
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = sorted(huggingface(arrays(layers=1)))
    dealt = {name: header[names[other]] for name, other in zip(names, swap)}
    text = json.dumps(header | dealt | entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    outcome(folder)


def test_the_whole_file_is_read_as_parsed(whole):
    folder, data = whole
    (folder / "model.safetensors").write_bytes(data)
    outcome(folder)
    assert len(jax.tree.leaves(checkpoint.read_huggingface(folder))) == 5
