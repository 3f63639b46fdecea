"""scripts/convert.py quantises, dequantises, merges adapters, and converts adapters alone."""

import json

import convert
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver

from gemma_mlp import LoRA, MLPConfig, add_lora, checkpoint, dequantize, layouts, merge_lora, quantize
from tests.support import by_hand
from tests.support.by_hand import equal
from tests.support.vary import slow

pytestmark = pytest.mark.promotes  # Orbax relies on promotion
D, F, LAYERS = 64, 96, 2
CONFIG = MLPConfig(D, F)
ORBAX = [f"--embed_dim={D}", f"--hidden_dim={F}"]


def run(*arguments):
    with flagsaver.flagsaver():
        flags.FLAGS(["convert", *map(str, arguments)])
        convert.main()


def model(tmp_path):
    """A folder, and its parameters."""
    params = by_hand.params(by_hand.arrays(CONFIG, LAYERS))
    checkpoint.write_huggingface(tmp_path / "model", params, CONFIG)
    return tmp_path / "model", params


@pytest.mark.parametrize(
    ("dtype", "group_size", "to"),
    [
        ("int8", None, "gemma_mlp_stacked"),
        slow("int4", 32, "gemma_mlp"),
        slow("int4", 32, "gemma_mlp_stacked"),
        slow("float8_e4m3fn", None, "gemma_mlp"),
    ],
)
def test_quantises_and_dequantises(tmp_path, capsys, dtype, group_size, to):
    folder, params = model(tmp_path)
    group = [] if group_size is None else [f"--group_size={group_size}"]
    run(f"--source={folder}", f"--target={tmp_path / 'low'}", f"--to={to}", f"--quantize={dtype}", *group)
    out = capsys.readouterr().out
    assert f"mlp/gate_proj/qvalue  {dtype}" in out and "read back and the same, bit for bit" in out
    expected = quantize(params, dtype, group_size)
    assert equal(checkpoint.read_orbax(tmp_path / "low", CONFIG), expected)
    back = [f"--source={tmp_path / 'low'}", *ORBAX, f"--target={tmp_path / 'back'}", "--to=huggingface"]
    with pytest.raises(SystemExit, match="must be a dense weight"):
        run(*back)
    run(*back, "--dequantize", "--dtype=float32")
    again = checkpoint.read_huggingface(tmp_path / "back")
    assert equal(again, jax.tree.map(lambda leaf: leaf.astype("float32"), dequantize(expected, "float32")))


def test_the_size_counts_four_bits(tmp_path, capsys):
    low = ["--to=gemma_mlp", "--quantize=int4", "--dry_run"]
    wide = MLPConfig(1024, 1024)
    zeros = by_hand.params([{name: jnp.zeros(shape, "bfloat16") for name, shape in shapes(wide).items()}])
    checkpoint.write_huggingface(tmp_path / "wide", zeros, wide)
    run(f"--source={tmp_path / 'wide'}", f"--target={tmp_path / 'low'}", *low)
    assert "8 tensors for 1 layers, 1.5 MiB" in capsys.readouterr().out
    assert not (tmp_path / "low").exists()


def shapes(config):
    return layouts.gemma_mlp(config).leaf_shapes


def write_gguf(path):
    writer = gguf.GGUFWriter(path, "gemma2")
    for key, size in {"embedding_length": D, "feed_forward_length": F, "block_count": LAYERS}.items():
        writer.add_uint32(f"gemma2.{key}", size)
    writer.add_float32("gemma2.attention.layer_norm_rms_epsilon", 1e-6)
    names = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for i, layer in enumerate(by_hand.arrays(CONFIG, LAYERS, "float32")):
        for leaf, name in names.items():
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(f"blk.{i}.{name}.weight", gguf.quantize(layer[leaf].T.copy(), kind), raw_dtype=kind)
        for leaf, name in {"pre_norm": "ffn_norm", "post_norm": "post_ffw_norm"}.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", 1 + layer[leaf])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_stays_quantised_or_not(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    expected = checkpoint.read_gguf(tmp_path / "model.gguf")
    run(f"--source={tmp_path / 'model.gguf'}", f"--target={tmp_path / 'low'}", "--to=gemma_mlp")
    assert equal(checkpoint.read_orbax(tmp_path / "low", CONFIG), expected)
    run(
        f"--source={tmp_path / 'model.gguf'}",
        f"--target={tmp_path / 'dense'}",
        *("--to=huggingface", "--dequantize", "--dtype=bfloat16"),
    )
    dense = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), dequantize(expected, "bfloat16"))
    assert equal(checkpoint.read_huggingface(tmp_path / "dense"), dense)


def test_a_compressed_folder(tmp_path):
    """Of int8, which is an ordinary tensor with scales."""
    folder, params = model(tmp_path)
    rng = np.random.default_rng(0)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".mlp." in name]:
        tensors[name] = rng.integers(-127, 128, tensors[name].shape).astype("int8")
        tensors[name.replace(".weight", ".weight_scale")] = np.ones((len(tensors[name]), 1), "float32")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    said = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    run(f"--source={folder}", f"--target={tmp_path / 'low'}", "--to=gemma_mlp")
    low = checkpoint.read_orbax(tmp_path / "low", CONFIG)
    np.testing.assert_array_equal(low[1].mlp.up_proj.qvalue, tensors["model.layers.1.mlp.up_proj.weight"].T)
    assert equal(low[1].pre_norm, params[1].pre_norm)


def test_int_wrapper_of_deepmind(tmp_path):
    """Each of its scales is a power of two, whose reciprocal is exact."""
    tree = by_hand.deepmind(by_hand.arrays(CONFIG, LAYERS), True)
    rng = np.random.default_rng(0)
    for layer in tree.values():
        layer["mlp"] = {
            f"_IntEinsum_{name}": {
                "kernel": jnp.asarray(rng.integers(-8, 8, shape), "int4"),
                "scale": jnp.asarray(2.0 ** rng.integers(0, 9, (*shape[:-2], *of_scale))),
            }
            for name, shape, of_scale in (("gating_einsum", (2, F, D), (F, 1)), ("linear", (F, D), (1, D)))
        }
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", tree)
    run(f"--source={tmp_path / 'theirs'}", *ORBAX, f"--target={tmp_path / 'low'}", "--to=gemma_mlp")
    up = checkpoint.read_orbax(tmp_path / "low", CONFIG)[1].mlp.up_proj
    gating = tree["layer_1"]["mlp"]["_IntEinsum_gating_einsum"]
    np.testing.assert_array_equal(up.qvalue.astype("int8"), gating["kernel"][1].T.astype("int8"))
    np.testing.assert_array_equal(up.scale, 1 / gating["scale"][1].T)


def adapters(params, factor=0.5, share=True):
    found = layouts.extract_adapters(add_lora(params, LoRA(rank=2, alpha=2 * factor), jax.random.key(0)))
    for number, of_layer in found.items():
        for i, (name, adapter) in enumerate(of_layer.items()):
            lora_b = jax.random.normal(jax.random.key(3 * number + i), adapter.lora_b.shape, "bfloat16")
            lora_a = of_layer["gate_proj"].lora_a if name == "up_proj" and share else adapter.lora_a
            of_layer[name] = layouts.Adapter(lora_a, lora_b, factor)
    return found


def test_adapters_are_merged(tmp_path):
    folder, params = model(tmp_path)
    checkpoint.write_adapters(tmp_path / "adapter", adapters(params))
    merge = [f"--source={folder}", f"--adapters={tmp_path / 'adapter'}"]
    run(*merge, f"--target={tmp_path / 'new'}", "--to=huggingface")
    expected = merge_lora(layouts.insert_adapters(params, adapters(params)))
    assert equal(checkpoint.read_huggingface(tmp_path / "new"), expected)
    assert not equal(expected, params)
    run(*merge, f"--target={tmp_path / 'low'}", "--to=gemma_mlp", "--quantize=int8")
    assert equal(checkpoint.read_orbax(tmp_path / "low", CONFIG), quantize(expected, "int8"))


def require_equal(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_adapters_alone(tmp_path, capsys):
    _, params = model(tmp_path)
    ours = adapters(params)
    checkpoint.write_adapters(tmp_path / "peft", ours)
    run(f"--source={tmp_path / 'peft'}", f"--target={tmp_path / 'lora'}", "--to=deepmind_lora")
    assert f"gate_proj  bfloat16 [{D}, 2] [2, {F}], factor 0.5" in capsys.readouterr().out
    theirs = checkpoint.read_orbax_adapters(tmp_path / "lora")
    scaled = {n: {name: (a, b * factor, 1.0) for name, (a, b, factor) in of.items()} for n, of in ours.items()}
    require_equal(theirs, scaled)
    names = ["--prefix=model.language_model.", "--base_model=google/gemma-3-4b-it"]
    run(f"--source={tmp_path / 'lora'}", f"--target={tmp_path / 'again'}", "--to=peft", *names)
    require_equal(checkpoint.read_adapters(tmp_path / "again"), theirs)
    said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "google/gemma-3-4b-it"
    assert f"model.language_model.layers.{LAYERS - 1}.mlp.up_proj" in said["target_modules"]


@pytest.mark.parametrize(("how", "to"), [("write_adapters", "peft"), slow("write_orbax_adapters", "deepmind_lora")])
def test_adapters_that_read_back_otherwise_are_reported(tmp_path, monkeypatch, how, to):
    sizes = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
    ones = {
        n: (np.ones((rows, 2), "float32"), np.ones((2, columns), "float32")) for n, (rows, columns) in sizes.items()
    }
    given = {0: {name: layouts.Adapter(*matrices) for name, matrices in ones.items()}}
    checkpoint.write_adapters(tmp_path / "peft", given)
    write, others = getattr(checkpoint, how), jax.tree.map(lambda leaf: 2 * leaf, given)
    monkeypatch.setattr(checkpoint, how, lambda path, _, **options: write(path, others, **options))
    with pytest.raises(SystemExit, match="What is read back must be what was written"):
        run(f"--source={tmp_path / 'peft'}", f"--target={tmp_path / 'new'}", f"--to={to}")


def test_adapters_that_need_a_larger_rank(tmp_path):
    _, params = model(tmp_path)
    checkpoint.write_adapters(tmp_path / "peft", adapters(params, share=False))
    arguments = [f"--source={tmp_path / 'peft'}", f"--target={tmp_path / 'lora'}", "--to=deepmind_lora"]
    with pytest.raises(SystemExit, match="share lora_a"):
        run(*arguments)
    run(*arguments, "--widen", "--dry_run")
    assert not (tmp_path / "lora").exists()
    run(*arguments, "--widen")
    assert checkpoint.read_orbax_adapters(tmp_path / "lora")[0]["up_proj"].lora_a.shape == (D, 4)


def test_what_is_refused(tmp_path):
    folder, params = model(tmp_path)
    checkpoint.write_adapters(tmp_path / "peft", adapters(params))
    target = f"--target={tmp_path / 'new'}"
    for arguments, error in (
        ([f"--source={tmp_path / 'peft'}", "--to=gemma_mlp"], "must be a whole model.*--adapters"),
        ([f"--source={folder}", "--to=gemma_mlp", "--group_size=32"], "--group_size must come with --quantize"),
        ([f"--source={folder}", "--to=gemma_mlp", "--quantize=int4", "--group_size=5"], "group_size must divide"),
        ([f"--source={folder}", "--to=tunix", "--quantize=int4"], "must be a dense weight"),
        ([f"--source={folder}", "--to=peft"], "must be an Orbax checkpoint"),
        ([f"--source={tmp_path / 'peft'}", f"--target={folder}", "--to=peft"], "target must be new"),
    ):
        with pytest.raises(SystemExit, match=error):
            run(target, *arguments)
    assert not (tmp_path / "new").exists()
