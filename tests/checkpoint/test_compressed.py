"""Folders of compressed-tensors, written here by hand, and all that is refused in them."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from gemma_mlp import MLPConfig, checkpoint
from tests.support import by_hand, huggingface_folder
from tests.support.by_hand import LAYERS

D, F = 16, 24
CONFIG = MLPConfig(D, F)
SAID = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
SETTINGS = huggingface_folder.SETTINGS | {"hidden_size": D, "intermediate_size": F, "quantization_config": SAID}
KINDS = {"int4": (4, "int4"), "int8 packed": (8, "int8"), "int8": (None, "int8"), "fp8": (None, "float8_e4m3fn")}
SIZES = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
GATE = "model.layers.1.mlp.gate_proj"


def packed(values, bits):
    """Each number plus 2^(bits - 1), the first in the lowest bits of an int32."""
    words = np.zeros((len(values), -(-values.shape[1] * bits // 32)), np.uint32)
    for row, numbers in enumerate(values):
        for at, number in enumerate(numbers):
            words[row, at * bits // 32] |= np.uint32((int(number) + 2 ** (bits - 1)) << (at * bits % 32))
    return words.view(np.int32)


def module(name, values, scale, bits):
    if bits is None:
        return {f"{name}.weight": values, f"{name}.weight_scale": scale}
    shape = np.array(values.shape, np.int64)
    return {f"{name}.weight_packed": packed(values, bits), f"{name}.weight_scale": scale, f"{name}.weight_shape": shape}


def tensors(kind="int4", groups=2, dtype=ml_dtypes.bfloat16):
    """The tensors of a folder, and for each projection its numbers and scales, as theirs (out, in)."""
    bits, of_values = KINDS[kind]
    rng = np.random.default_rng(0)
    made = by_hand.huggingface(by_hand.arrays(CONFIG)) | huggingface_folder.others(LAYERS)
    numbers = {}
    for layer in range(LAYERS):
        for leaf, shape in SIZES.items():
            name = f"model.layers.{layer}.mlp.{leaf}"
            del made[f"{name}.weight"]
            low, high = (-8, 8) if of_values == "int4" else (-128, 128)
            values = rng.integers(low, high, shape).astype("int8" if "int" in kind else of_values)
            scale = rng.uniform(0.5, 2, (shape[0], groups)).astype(dtype)
            numbers[layer, leaf] = values, scale
            made |= module(name, values, scale, bits)
    return made, numbers


def write(folder, made, said=SAID, **change):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"quantization_config": said} | change))
    huggingface_folder.save(folder / "model.safetensors", made)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_number_is_read(tmp_path, kind, groups, dtype):
    made, numbers = tensors(kind, groups, dtype)
    layers = checkpoint.read_huggingface(write(tmp_path / "model", made), layers=[3, 0])
    for layer, params in zip((3, 0), layers):
        for leaf in SIZES:
            weight, (values, scale) = getattr(params.mlp, leaf), numbers[layer, leaf]
            assert weight.qvalue.dtype == KINDS[kind][1]
            assert weight.dtype == ("float32" if dtype == np.float16 else dtype)
            np.testing.assert_array_equal(weight.qvalue.astype("float32"), values.T.astype("float32"))
            np.testing.assert_array_equal(weight.scale.astype("float32"), scale.T.astype("float32"))
        name = f"model.layers.{layer}.pre_feedforward_layernorm.weight"
        np.testing.assert_array_equal(params.pre_norm.scale, made[name])


def test_one_scale_for_a_whole_weight_and_a_weight_that_was_left_out(tmp_path):
    made, numbers = tensors("int8")
    made[f"{GATE}.weight_scale"] = np.array([3], np.float32)
    del made["model.layers.1.mlp.up_proj.weight_scale"]
    made["model.layers.1.mlp.up_proj.weight"] = plain = np.arange(F * D, dtype="float32").reshape(F, D)
    (layer,) = checkpoint.read_huggingface(write(tmp_path / "model", made), layers=[1])
    np.testing.assert_array_equal(layer.mlp.gate_proj.scale, np.full((1, F), 3))
    np.testing.assert_array_equal(layer.mlp.gate_proj.qvalue, numbers[1, "gate_proj"][0].T)
    np.testing.assert_array_equal(layer.mlp.up_proj, plain.T)


def test_scales_of_activations_are_passed_over(tmp_path):
    made, _ = tensors("int8", 1)
    made[f"{GATE}.input_scale"] = np.ones(1, np.float32)
    assert len(checkpoint.read_huggingface(write(tmp_path / "model", made))) == LAYERS


def test_layers_of_two_widths(tmp_path):
    """As in Gemma 4 E2B. A list takes them, a stack does not."""
    made, _ = tensors()
    for leaf in SIZES:
        name, shape = f"model.layers.4.mlp.{leaf}", np.array(SIZES[leaf]) * ((1, 2) if leaf == "down_proj" else (2, 1))
        made |= module(name, np.ones(shape, "int8"), np.ones((shape[0], 2), np.float32), 4)
    kind = {"model_type": "gemma4_text", "use_double_wide_mlp": True, "num_kv_shared_layers": 1}
    folder = write(tmp_path / "model", made, **kind)
    layers = checkpoint.read_huggingface(folder)
    assert [layer.mlp.gate_proj.shape[1] for layer in layers] == [F, F, F, F, 2 * F]
    with pytest.raises(ValueError, match="A stack needs layers of one width"):
        checkpoint.read_huggingface(folder, stacked=True)
    stack = checkpoint.read_huggingface(folder, stacked=True, layers=[0, 2])
    jax.tree.map(lambda whole, one: np.testing.assert_array_equal(whole[1], one), stack, layers[2])


def said(**change):
    return lambda folder: write(folder, tensors()[0], SAID | change)


def changed(kind="int4", **change):
    """Replaces tensors of layer 1's gate_proj; None removes one."""

    def break_(folder):
        made, _ = tensors(kind)
        for name, array in change.items():
            if array is None:
                del made[f"{GATE}.{name}"]
            else:
                made[f"{GATE}.{name}"] = array
        write(folder, made)

    return break_


def scales(*shape, value=1.0):
    return {"weight_scale": np.full(shape, value, np.float32)}


REFUSED = {  # name: (what makes it, the error)
    "an unknown format": (said(format="nvfp4-pack-quantized"), "format of quantization_config .*'nvfp4-pack-quanti"),
    "no format": (said(format=None), "format of quantization_config .*None"),
    "a transformed weight": (said(transform_config={"config_groups": {"u": {}}}), "neither transformed nor sparse"),
    "a sparse weight": (said(sparsity_config={"format": "sparse-24-bitmask"}), "nor sparse.*sparse-24-bitmask"),
    "zero points": (changed(weight_zero_point=np.zeros((3, 2), np.int32)), "symmetric.*weight_zero_point"),
    "reordered columns": (changed(weight_g_idx=np.zeros(D, np.int32)), "in the order.*weight_g_idx"),
    "a bias": (changed(bias=np.zeros(F, np.float32)), r"Got: bias\."),
    "NaN scales": (changed(**scales(F, 2, value=np.nan)), rf"{GATE}\.weight in .*must be finite.*48 numbers"),
    "infinite scales": (changed(**scales(F, 1, value=np.inf)), "must be finite"),
    "scales that do not divide": (changed(**scales(F, 3)), r"scale must be \[groups, out\].*int4\[16, 24\].*\[3, 24\]"),
    "transposed scales": (changed(**scales(2, F)), r"scale must be \[groups, out\].*\[24, 2\]"),
    "scales of rank 1": (changed(**scales(F)), r"scale must be \[groups, out\]"),
    "scales of blocks": (changed(**scales(3, 2)), r"scale must be \[groups, out\].*\[2, 3\]"),
    "integer scales": (changed(weight_scale=np.ones((F, 2), np.int32)), "must be of floating-point numbers.*int32"),
    "no scales": (changed(weight_scale=None), rf"must hold {GATE}\.weight_scale"),
    "no scales for int8": (changed("int8", weight_scale=None), r"weight int8\[24, 16\] without weight_scale"),
    "a weight not yet compressed": (changed("int8", weight=np.ones((F, D), "float32")), "float32.* with weight_scale"),
    "uint8": (changed("int8", weight=np.ones((F, D), np.uint8)), "qvalue dtype must be one of int8.*'uint8'"),
    "no weight": (changed("int8", weight=None), rf"must hold {GATE}\.weight"),
    "no shape": (changed(weight_shape=None), rf"must hold {GATE}\.weight_shape"),
    "5 bits": (
        changed(weight_packed=np.zeros((F, 3), np.int32)),
        r"is 4 or 8.*int32\[24, 3\], weight_shape \[24, 1",
    ),
    "another packing": (changed(weight_packed=np.zeros((F, 8), np.uint8)), r"weight_packed int32.*uint8\[24, 8\]"),
    "another shape": (changed(weight_shape=np.array([F, 8])), r"must be \[16, 24\].*\[8, 24\]"),
    "a shape of rank 3": (changed(weight_shape=np.array([1, F, D])), r"weight_shape \[1, 24, 16\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    make, error = REFUSED[name]
    make(tmp_path / "model")
    with pytest.raises(ValueError, match=error):
        checkpoint.read_huggingface(tmp_path / "model")


def test_a_model_of_other_sizes(tmp_path):
    folder = write(tmp_path / "model", tensors()[0], intermediate_size=F + 8)
    with pytest.raises(ValueError, match=r"gate_proj\.weight in .* must be \[16, 32\].*\[16, 24\]"):
        checkpoint.read_huggingface(folder)


def test_it_cannot_be_updated(tmp_path):
    folder = write(tmp_path / "model", tensors()[0])
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="they cannot be updated"):
        checkpoint.update_huggingface(folder, by_hand.params(by_hand.arrays(CONFIG)))
    assert (folder / "model.safetensors").read_bytes() == before
