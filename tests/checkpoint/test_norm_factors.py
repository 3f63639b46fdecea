"""Gemma 3n and 4 store a norm as its factor, which is 1 + w here; their layers may differ in width."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_mlp import MLPConfig, checkpoint, layouts
from tests.support.by_hand import CONFIG, D, F, arrays, deepmind, equal, huggingface, params
from tests.support.huggingface_folder import load, save

pytestmark = pytest.mark.promotes  # Orbax relies on promotion
WIDE = MLPConfig(D, 2 * F)
NORMS = ("pre_norm", "post_norm")


def factors(layers, dtype):
    """The layers as these models store them, and as they must be read: w is the factor - 1, in float32."""
    stored, read = [], []
    for layer in layers:
        norms = {name: (1 + layer[name].astype(np.float32)).astype(dtype) for name in NORMS}
        stored.append({name: leaf.astype(dtype) for name, leaf in layer.items()} | norms)
        read.append(stored[-1] | {name: norm.astype(np.float32) - 1 for name, norm in norms.items()})
    return stored, read


def write(folder, layers, model_type="gemma4_text", **settings):
    folder.mkdir()
    save(folder / "model.safetensors", huggingface(layers) | {"model.layers.0.layer_scalar": np.ones(1, np.float32)})
    geometry = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": len(layers)}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | geometry | settings))
    return folder


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text", "gemma4_unified_text"])
def test_read_and_written_back(tmp_path, model_type, stacked):
    stored, read = factors(arrays(), ml_dtypes.bfloat16)
    folder = write(tmp_path / "c", stored, model_type)
    before = (folder / "model.safetensors").read_bytes()
    layers = checkpoint.read_huggingface(folder)
    assert equal(layers, params(read))
    assert equal(checkpoint.read_huggingface(folder, stacked=True), layouts.stack(params(read)))
    assert jax.tree.map(lambda leaf: leaf.dtype, checkpoint.huggingface_shapes(folder)) == jax.tree.map(
        lambda leaf: leaf.dtype, layers
    )
    checkpoint.update_huggingface(folder, layers[::-1])
    assert equal(checkpoint.read_huggingface(folder), layers[::-1])
    checkpoint.update_huggingface(folder, layers)
    assert (folder / "model.safetensors").read_bytes() == before


def test_what_would_be_rounded_is_refused_unless_asked(tmp_path):
    stored, read = factors(arrays(), ml_dtypes.bfloat16)
    folder = write(tmp_path / "a", stored)
    before = (folder / "model.safetensors").read_bytes()
    layers = params(read)
    trained = [jax.tree.map(lambda leaf: leaf + jnp.asarray(2.0**-12, leaf.dtype), layer) for layer in layers]
    with pytest.raises(ValueError, match=r"weight stores 1 \+ w in bfloat16\. Got: 4 of 4 .*round_norms=True"):
        checkpoint.update_huggingface(folder, trained)
    assert (folder / "model.safetensors").read_bytes() == before and len(list(folder.iterdir())) == 2
    checkpoint.update_huggingface(folder, trained, round_norms=True)
    got = load(folder)["model.layers.2.pre_feedforward_layernorm.weight"]
    assert equal(np.asarray(got), np.asarray(1 + trained[2].pre_norm.scale).astype(ml_dtypes.bfloat16))
    stored[1]["post_norm"] = np.full(D, 0.1, np.float32)  # 0.1 - 1 loses bits in float32
    folder = write(tmp_path / "b", stored)
    with pytest.raises(ValueError, match=r"layers\.1\.post_feedforward_layernorm.*stores 1 \+ w.*round_norms=True"):
        checkpoint.read_huggingface(folder)
    got = checkpoint.read_huggingface(folder, round_norms=True)[1].post_norm.scale
    assert equal(got, jnp.full(D, np.float32(0.1) - np.float32(1)))


def test_layers_of_several_widths(tmp_path):
    """As in Gemma 4 E2B: the last layers, which share keys and values, are twice as wide."""
    narrow, narrow_read = factors(arrays(layers=3), ml_dtypes.bfloat16)
    wide, wide_read = factors(arrays(WIDE, layers=2), ml_dtypes.bfloat16)
    folder = write(tmp_path / "c", narrow + wide, use_double_wide_mlp=True, num_kv_shared_layers=2)
    expected = params(narrow_read + wide_read)
    assert checkpoint.read_configs(folder) == [CONFIG] * 3 + [WIDE] * 2
    assert equal(checkpoint.read_huggingface(folder), expected)
    assert equal(checkpoint.read_huggingface(folder, layers=[4, 0, 3]), [expected[i] for i in (4, 0, 3)])
    assert [s.mlp.up_proj.shape for s in checkpoint.huggingface_shapes(folder)] == [(D, F)] * 3 + [(D, 2 * F)] * 2
    assert equal(checkpoint.read_huggingface(folder, layers=[3, 4], stacked=True), layouts.stack(expected[3:]))
    with pytest.raises(ValueError, match=r"A stack needs layers of one width\. Got: hidden_dim \[6, 12\]"):
        checkpoint.read_huggingface(folder, stacked=True)
    swapped = [expected[i] for i in (2, 1, 0, 4, 3)]
    checkpoint.update_huggingface(folder, swapped)
    assert equal(checkpoint.read_huggingface(folder), swapped)
    checkpoint.update_huggingface(folder, [expected[4], expected[0]], layers=[4, 0])
    assert equal(checkpoint.read_huggingface(folder, layers=[0, 4]), [expected[0], expected[4]])


def test_layers_with_a_threshold_on_the_gate_are_refused(tmp_path):
    stored, read = factors(arrays(layers=12), ml_dtypes.bfloat16)
    folder = write(tmp_path / "c", stored, "gemma3n_text")
    with pytest.raises(ValueError, match=r"Layer 0 must compute this block\. Got: a threshold on the gate"):
        checkpoint.read_huggingface(folder)
    assert equal(checkpoint.read_huggingface(folder, layers=[10, 11]), params(read)[10:])


@pytest.mark.parametrize("mark", ["skip_scale", "altup", "laurel"])
def test_the_names_of_an_orbax_checkpoint_tell_it(tmp_path, mark):
    stored, read = factors(arrays(), ml_dtypes.bfloat16)
    tree = deepmind(stored, True)
    tree["layer_0"][mark] = np.ones(1, np.float32)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
    assert equal(checkpoint.read_orbax(tmp_path / "c", CONFIG), params(read))
    layout = layouts.norm_factors(layouts.deepmind(CONFIG, transpose_gating_einsum=True))
    assert equal(checkpoint.read_orbax(tmp_path / "c", CONFIG, layout=layout), params(read))
    written = layouts.to_tree(params(read), layout)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), written)
    assert equal(wide, deepmind(stored, True))


def test_other_libraries_keep_w_next_to_such_tensors():
    """Such as a decoder of our blocks that has Gemma 4's scalar: the blocks hold w, as they read it."""
    layers = params(arrays())
    tree = layouts.to_tree(layers, layouts.gemma_mlp(CONFIG))
    tree["layers_0"]["layer_scalar"] = np.ones(1, np.float32)
    assert equal(layouts.from_tree(tree, layouts.detect(layouts.flatten(tree), CONFIG)), layers)


def test_a_factor_in_float64_gives_w_in_float64():
    layers = [
        {name: np.asarray(leaf, np.float64) * 0.3 for name, leaf in layer.items()} for layer in arrays(dtype=np.float64)
    ]
    tree = deepmind([layer | {name: 1 + layer[name] for name in NORMS} for layer in layers], True)
    layout = layouts.norm_factors(layouts.deepmind(CONFIG), round_norms=True)
    got = layouts.from_tree(tree, layout)[2].post_norm.scale
    assert got.dtype == np.float64 and np.abs(got - layers[2]["post_norm"]).max() < 1e-15
