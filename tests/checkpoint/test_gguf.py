"""GGUF files, written by the library gguf, and read as its own dequantisation says, bit for bit."""

import dataclasses
import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_mlp
from gemma_mlp import MLPConfig, QuantizedWeight, checkpoint, dequantize
from gemma_mlp.layouts.trees import block_leaves
from gemma_mlp.testing.oracle import relative_error
from tests.support import by_hand

LAYERS = 2
CONFIG = MLPConfig(64, 96)
NAMES = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
NORMS = {"pre_norm": "ffn_norm", "post_norm": "post_ffw_norm"}
TYPES = {"Q4_0": "int4", "Q8_0": "int8", "F16": "float32", "BF16": "bfloat16", "F32": "float32"}


def write(path, kind="Q4_0", config=CONFIG, change=None, architecture="gemma2", **fields):
    """Writes a file. Returns the numbers of gguf's own dequantisation, by layer and leaf, as (in, out)."""
    layers = by_hand.arrays(config, LAYERS, "float32")
    for layer in layers:
        layer["down_proj"][:32] = 0  # a block of zeros, whose scale is 0
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {"embedding_length": config.embed_dim, "feed_forward_length": config.hidden_dim, "block_count": LAYERS}
    for key, value in (sizes | fields).items():
        writer.add_uint32(key if "." in key else f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.norm_eps)
    tensors = {"token_embd.weight": (np.ones((8, 256), "float32"), "Q4_0")}
    for number, layer in enumerate(layers):
        tensors |= {f"blk.{number}.{name}.weight": (layer[leaf].T.copy(), kind) for leaf, name in NAMES.items()}
        tensors |= {f"blk.{number}.{NORMS[leaf]}.weight": (1 + layer[leaf], "F32") for leaf in NORMS.keys() & layer}
    if change:
        change(tensors)
    expected = {}
    for name, (array, kind_of_it) in tensors.items():
        qtype = gguf.GGMLQuantizationType[kind_of_it]
        stored = gguf.quantize(array, qtype)
        expected[name] = gguf.dequantize(stored, qtype).T
        writer.add_tensor(name, stored, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("kind", TYPES)
def test_every_number_is_that_of_ggufs_own_dequantisation(tmp_path, kind):
    expected = write(tmp_path / "model.gguf", kind)
    config, num_layers = checkpoint.read_gguf_config(tmp_path / "model.gguf")
    assert (config, num_layers) == (CONFIG, LAYERS)
    layers = checkpoint.read_gguf(tmp_path / "model.gguf")
    for number, layer in enumerate(layers):
        for leaf, name in NAMES.items():
            weight = getattr(layer.mlp, leaf)
            if kind.startswith("Q"):
                assert isinstance(weight, QuantizedWeight) and weight.group_size == 32
                assert (weight.qvalue.dtype, weight.scale.dtype) == (TYPES[kind], "float32")
            else:
                assert weight.dtype == TYPES[kind]
            dense = np.asarray(getattr(dequantize(layer).mlp, leaf), "float32")
            np.testing.assert_array_equal(dense.view("uint32"), expected[f"blk.{number}.{name}.weight"].view("uint32"))
        for norm, name in NORMS.items():
            np.testing.assert_array_equal(1 + getattr(layer, norm).scale, expected[f"blk.{number}.{name}.weight"])


def test_names_are_those_of_ggufs_table():
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, LAYERS)
    theirs = {"pre_norm": "pre_feedforward_layernorm", "post_norm": "post_feedforward_layernorm"}
    for leaf, name in (NAMES | NORMS).items():
        assert names.get_name(f"model.layers.1.{theirs.get(leaf, f'mlp.{leaf}')}") == f"blk.1.{name}"


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3", "gemma-embedding"])
def test_architectures(tmp_path, architecture):
    config = dataclasses.replace(CONFIG, post_norm=architecture != "gemma", norm_eps=1e-5)
    write(tmp_path / "model.gguf", config=config, architecture=architecture)
    assert checkpoint.read_gguf_config(tmp_path / "model.gguf").config == config
    (layer,) = checkpoint.read_gguf(tmp_path / "model.gguf", layers=[1])
    assert (layer.post_norm is None) == (architecture == "gemma")


def test_the_block_runs_on_what_is_read(tmp_path):
    write(tmp_path / "model.gguf")
    layer = checkpoint.read_gguf(tmp_path / "model.gguf")[1]
    x = jax.random.normal(jax.random.key(0), (3, 64))
    y, expected = (gemma_mlp.mlp_block(params, x, CONFIG) for params in (layer, dequantize(layer)))
    assert relative_error(y, np.asarray(expected, "float64")) <= 1e-6


@pytest.mark.parametrize("kind", ["Q4_0", "F16"])
def test_dtype_casts_scales_and_arrays(tmp_path, kind):
    write(tmp_path / "model.gguf", kind)
    plain = checkpoint.read_gguf(tmp_path / "model.gguf")
    cast = checkpoint.read_gguf(tmp_path / "model.gguf", dtype="bfloat16")
    floats = [leaf for leaf in jax.tree.leaves(cast) if leaf.dtype not in ("int4", "int8")]
    assert {leaf.dtype.name for leaf in floats} == {"bfloat16"}
    for ours, full in zip(jax.tree.leaves(cast), jax.tree.leaves(plain)):
        np.testing.assert_array_equal(ours, full.astype(ours.dtype))


def test_stacked(tmp_path):
    write(tmp_path / "model.gguf", "Q8_0")
    layers = checkpoint.read_gguf(tmp_path / "model.gguf", layers=[1, 0])
    stack = checkpoint.read_gguf(tmp_path / "model.gguf", layers=[1, 0], stacked=True)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    jax.tree.map(np.testing.assert_array_equal, stack, expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_onto_a_mesh(tmp_path, stacked, eight_devices):
    write(tmp_path / "model.gguf", "Q8_0", MLPConfig(64, 256))
    mesh = jax.make_mesh((8,), ("tensor",))
    lead = (None,) if stacked else ()
    axes = {"gate_proj": (None, "tensor"), "up_proj": (None, "tensor"), "down_proj": ("tensor", None)}
    axes |= {"pre_norm": (), "post_norm": ()}
    places = {leaf: jax.NamedSharding(mesh, jax.P(*lead, *spec)) for leaf, spec in axes.items()}
    shardings = gemma_mlp.layouts.make_params(places)
    options = {"shardings": shardings, "stacked": stacked}
    sharded = checkpoint.read_gguf(tmp_path / "model.gguf", **options)
    plain = checkpoint.read_gguf(tmp_path / "model.gguf", stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, sharded, plain)
    for leaf, weight in block_leaves(sharded if stacked else sharded[1]).items():
        for array in jax.tree.leaves(weight):
            assert array.sharding == places[leaf]


def test_groups_along_d_are_not_split(tmp_path, eight_devices):
    """D has two groups of 32 here, fewer than the devices that split it. Specs of quantised weights say the same."""
    write(tmp_path / "model.gguf", "Q8_0", MLPConfig(64, 256))
    config, _ = checkpoint.read_gguf_config(tmp_path / "model.gguf")
    mesh = jax.make_mesh((8, 1), ("fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    named = functools.partial(gemma_mlp.sharding.named_shardings, mesh=mesh)
    shardings = named(gemma_mlp.MLPBlockParams.specs(config))
    quantized = dataclasses.replace(config, weight_dtype="int8", group_size=32)
    expected = named(gemma_mlp.MLPBlockParams.specs(quantized)).mlp.gate_proj
    gate = checkpoint.read_gguf(tmp_path / "model.gguf", shardings=shardings)[0].mlp.gate_proj
    assert gate.qvalue.sharding == expected.qvalue and expected.qvalue.spec == jax.P("fsdp", "tensor")
    assert gate.scale.sharding.is_equivalent_to(expected.scale, 2) and gate.scale.shape[0] == 2


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, array, kind):
    return lambda tensors: tensors.update({name: (np.asarray(array, "float32"), kind)})


GATE, NORM = "blk.1.ffn_gate.weight", "blk.1.ffn_norm.weight"
REFUSED = {  # name: (what is written, the error)
    "another type": ({"kind": "Q5_0"}, r"blk\.\d\.ffn_gate\.weight in .* must be of GGML's type .*Q4_0\. \w+: Q5_0"),
    "a quantised norm": ({"change": put(NORM, np.ones(64), "Q8_0")}, "of GGML's type F32"),
    "no weight": ({"change": drop(GATE)}, rf"must hold {GATE}"),
    "another width": ({"change": put(GATE, np.ones((64, 64)), "Q4_0")}, r"must be \[64, 96\].*64, 64"),
    "transposed": ({"change": put(GATE, np.ones((64, 96)), "BF16")}, r"must be \[64, 96\].*96, 64"),
    "a scale that is not finite": ({"change": put(GATE, np.full((96, 64), 1e9), "Q8_0")}, rf"{GATE} in .* be finite"),
    "a NaN": ({"change": put(GATE, np.full((96, 64), np.nan), "F16")}, "must be finite"),
    "a norm that is not 1 + w": ({"change": put(NORM, np.full(64, 1e-9), "F32")}, "stores 1 \\+ w.*round_norms"),
    "another model": ({"architecture": "llama"}, "general.architecture in .* must be one of gemma, .*'llama'"),
    "Gemma 3n": ({"architecture": "gemma3n"}, "general.architecture"),
    "one of several files": ({"split.count": 2}, "must be the only file.*one of 2 parts"),
    "no layers": ({"block_count": 0}, "block_count in .* must be a whole number of at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # gguf rounds to infinities
def test_what_is_refused(tmp_path, name):
    options, error = REFUSED[name]
    write(tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=error):
        checkpoint.read_gguf(tmp_path / "model.gguf")


def test_norms_are_rounded_on_request(tmp_path):
    write(tmp_path / "model.gguf", change=put(NORM, np.full(64, 1e-9), "F32"))
    assert (checkpoint.read_gguf(tmp_path / "model.gguf", round_norms=True)[1].pre_norm.scale == -1).all()


@pytest.mark.parametrize("size", [3, 30, 900, -100])
def test_a_file_that_is_cut_short(tmp_path, size):
    write(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[:size])
    with pytest.raises(ValueError, match="must be a whole GGUF file"):
        checkpoint.read_gguf(tmp_path / "model.gguf")


def test_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="must be a file on this disk"):
        checkpoint.read_gguf(tmp_path)
