"""Gemma 3n and 4: norms multiply by w, layers differ in width, and some gates of Gemma 3n have a threshold."""

import json

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_mlp import MLPConfig, checkpoint, layouts
from tests.support.by_hand import D, F, arrays, deepmind, equal, huggingface, params
from tests.support.huggingface_folder import save

pytestmark = pytest.mark.promotes  # Orbax relies on promotion
CONFIG = MLPConfig(D, F, scale_plus_one=False)
WIDE = MLPConfig(D, 2 * F, scale_plus_one=False)
DTYPES = [ml_dtypes.bfloat16, np.float32]


def write(folder, layers, model_type="gemma4_text", **settings):
    folder.mkdir()
    save(folder / "model.safetensors", huggingface(layers) | {"model.layers.0.layer_scalar": np.ones(1, np.float32)})
    geometry = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": len(layers)}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | geometry | settings))
    return folder


def thirds(layers):
    """The layers with norms of which no 1 + w, nor w - 1, is exact."""
    third = lambda w: (w / 3).astype(w.dtype)  # noqa: E731
    return [layer | {name: third(layer[name]) for name in ("pre_norm", "post_norm")} for layer in layers]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text", "gemma4_unified_text"])
def test_norms_are_read_and_written_bit_for_bit(tmp_path, model_type, dtype):
    stored = thirds(arrays(dtype=dtype))
    folder = write(tmp_path / "c", stored, model_type)
    before = (folder / "model.safetensors").read_bytes()
    assert checkpoint.read_config(folder) == (CONFIG, len(stored))
    layers = checkpoint.read_huggingface(folder)
    assert equal(layers, params(stored))
    assert equal(checkpoint.read_huggingface(folder, stacked=True), layouts.stack(params(stored)))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), layers)
    assert checkpoint.huggingface_shapes(folder) == shapes
    checkpoint.update_huggingface(folder, layers[::-1])
    assert equal(checkpoint.read_huggingface(folder), layers[::-1])
    checkpoint.update_huggingface(folder, layers)
    assert (folder / "model.safetensors").read_bytes() == before


def test_norms_must_have_the_dtype_of_the_file(tmp_path):
    folder = write(tmp_path / "c", arrays())
    with pytest.raises(ValueError, match=r"layernorm\.weight must be bfloat16"):
        wide = [layer | {"pre_norm": layer["pre_norm"].astype(np.float32)} for layer in arrays()]
        checkpoint.update_huggingface(folder, params(wide))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_folder_says_what_its_norms_multiply_by(tmp_path, dtype):
    layers = params(thirds(arrays(dtype=dtype)))
    checkpoint.write_huggingface(tmp_path / "c", layers, CONFIG)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["model_type"] == "gemma4_text"
    assert checkpoint.read_config(tmp_path / "c") == (CONFIG, len(layers))
    assert equal(checkpoint.read_huggingface(tmp_path / "c"), layers)
    alone = MLPConfig(D, F, post_norm=False, scale_plus_one=False)
    with pytest.raises(ValueError, match=r"must have a model_type.*scale_plus_one=False without post_norm.*Orbax"):
        checkpoint.write_huggingface(tmp_path / "d", params(arrays(alone)), alone)


def test_layers_of_several_widths(tmp_path):
    """As in Gemma 4 E2B: the last layers, which share keys and values, are twice as wide."""
    stored = arrays(layers=3) + arrays(WIDE, layers=2)
    folder = write(tmp_path / "c", stored, use_double_wide_mlp=True, num_kv_shared_layers=2)
    expected = params(stored)
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


def test_layers_with_a_threshold_on_the_gate_are_read_only_on_request(tmp_path):
    """Else `mlp_block` would give other numbers than the model."""
    folder = write(tmp_path / "c", arrays(layers=12), "gemma3n_text")
    layers, swapped = params(arrays(layers=12)), params(arrays(layers=12)[::-1])
    message = r"Layer 0 must compute this block\. Got: a threshold on the gate.*allow_activation_sparsity=True"
    refused = [checkpoint.read_huggingface, checkpoint.huggingface_shapes, checkpoint.read_configs]
    for call in (*refused, lambda folder: checkpoint.update_huggingface(folder, swapped)):
        with pytest.raises(ValueError, match=message):
            call(folder)
    assert equal(checkpoint.read_huggingface(folder, layers=[10, 11]), layers[10:])
    allowed = {"allow_activation_sparsity": True}
    assert checkpoint.read_configs(folder, **allowed) == [CONFIG] * 12
    assert equal(checkpoint.read_huggingface(folder, **allowed), layers)
    assert equal(
        checkpoint.read_huggingface(folder, layers=[3, 10], stacked=True, **allowed), layouts.stack(layers[3:11:7])
    )
    assert len(checkpoint.huggingface_shapes(folder, **allowed)) == 12
    checkpoint.update_huggingface(folder, swapped, **allowed)
    assert equal(checkpoint.read_huggingface(folder, **allowed), swapped)


@pytest.mark.parametrize("mark", ["skip_scale", "altup", "laurel"])
def test_the_names_of_an_orbax_checkpoint_contradict_a_wrong_config(tmp_path, mark):
    stored = thirds(arrays())
    tree = deepmind(stored, True)
    tree["layer_0"][mark] = np.ones(1, np.float32)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
    assert equal(checkpoint.read_orbax(tmp_path / "c", CONFIG), params(stored))
    wrong = MLPConfig(D, F)
    message = rf"must have scale_plus_one=False\. Got: scale_plus_one=True, and tensors such as layer_0/{mark}\. Fix: "
    with pytest.raises(ValueError, match=message):
        checkpoint.read_orbax(tmp_path / "c", wrong)
    layout = layouts.deepmind(CONFIG, transpose_gating_einsum=True)
    assert equal(layouts.to_tree(params(stored), layout), deepmind(stored, True))


@pytest.mark.parametrize("plus_one", [True, False])
def test_our_own_modules_hold_w_next_to_such_tensors(plus_one):
    """Such as a decoder of our blocks that has Gemma 4's scalar: its norms are as its config says."""
    config, layers = MLPConfig(D, F, scale_plus_one=plus_one), params(arrays())
    tree = layouts.to_tree(layers, layouts.gemma_mlp(config))
    tree["layers_0"]["layer_scalar"] = np.ones(1, np.float32)
    assert equal(layouts.from_tree(tree, layouts.detect(layouts.flatten(tree), config)), layers)
