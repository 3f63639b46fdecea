"""Folders that compressed-tensors has written are read as it decompresses them itself, bit for bit."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with contextlib.suppress(ModuleNotFoundError):  # then tests/conftest.py leaves these tests out
    import torch
    import transformers
    from compressed_tensors import quantization
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

from gemma_mlp import QuantizedWeight, checkpoint, dequantize

pytestmark = pytest.mark.needs_peers

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "attn_implementation": "eager",
}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
DYNAMIC = {"strategy": "token", "dynamic": True}
KINDS = {  # name: (arguments of the weights, of the activations, the format, our dtype, groups of gate_proj)
    "int4 in groups of 32": (INT4, None, "pack-quantized", "int4", 2),
    "int4 per channel": (INT4 | {"strategy": "channel", "group_size": None}, None, "pack-quantized", "int4", 1),
    "int8 packed": (INT4 | {"num_bits": 8}, None, "pack-quantized", "int8", 2),
    "int8": ({"num_bits": 8, "type": "int", "strategy": "channel"}, DYNAMIC, "int-quantized", "int8", 1),
    "fp8": (FP8, FP8 | DYNAMIC, "float-quantized", "float8_e4m3fn", 1),
    "fp8 per tensor": (FP8 | {"strategy": "tensor"}, FP8 | DYNAMIC, "float-quantized", "float8_e4m3fn", 1),
    "fp8 weights alone": (FP8, None, "naive-quantized", "float8_e4m3fn", 1),
}


def compressed(folder, weights, activations, dtype):
    """Saves a compressed model. Returns the model, decompressed again."""
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES)).to(dtype)
    arguments = quantization.QuantizationArgs(**weights)
    inputs = quantization.QuantizationArgs(**{"num_bits": 8, **activations}) if activations else None
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=inputs)
    config = quantization.QuantizationConfig(config_groups={"group": scheme}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            weight = module.weight.data
            shape = {"group": (len(weight), -1, 32), "channel": (len(weight), 1, -1), "tensor": (1, 1, -1)}
            groups = weight.reshape(shape[arguments.strategy])
            scale = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)[0]
            module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_number_is_as_it_decompresses_it(kind, dtype, tmp_path):
    weights, activations, said, ours, groups = KINDS[kind]
    model = compressed(tmp_path / "model", weights, activations, getattr(torch, dtype))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.quantization_config["format"] == said
    layers = checkpoint.read_huggingface(tmp_path / "model")
    for layer, dense, theirs in zip(layers, dequantize(layers), model.model.layers):
        assert layer.mlp.gate_proj.scale.shape == (groups, SIZES["intermediate_size"])
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(layer.mlp, name)
            assert isinstance(weight, QuantizedWeight)
            assert (weight.qvalue.dtype, weight.dtype) == (ours, dtype)
            expected = getattr(theirs.mlp, name).weight.detach().float().numpy().T
            np.testing.assert_array_equal(np.asarray(getattr(dense.mlp, name), "float32"), expected)
        norm = theirs.pre_feedforward_layernorm.weight.detach().float().numpy()
        np.testing.assert_array_equal(np.asarray(layer.pre_norm.scale, "float32"), norm)
    stack = checkpoint.read_huggingface(tmp_path / "model", stacked=True)
    jax.tree.map(np.testing.assert_array_equal, stack, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
