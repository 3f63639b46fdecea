"""Adapters that PEFT has trained compute the same on our block, and PEFT loads those that we write."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

with contextlib.suppress(ModuleNotFoundError):  # then tests/conftest.py leaves these tests out
    import peft
    import torch
    import transformers

from gemma_mlp import checkpoint, layouts, mlp, remove_lora
from gemma_mlp.testing.oracle import relative_error

pytestmark = [pytest.mark.needs_peers, pytest.mark.filterwarnings("ignore::FutureWarning")]  # PEFT calls old names

BOUND = 1e-5
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "attn_implementation": "eager",
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MLP = ["gate_proj", "up_proj", "down_proj"]
KINDS = {
    "alpha over r": {"target_modules": MLP, "r": 4, "lora_alpha": 6},
    "alpha over the root of r": {"target_modules": MLP, "r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", *MLP],
        "r": 4,
        "lora_alpha": 7,
        "rank_pattern": {"down_proj": 3, r"layers\.1\.mlp\.gate_proj": 2},
        "alpha_pattern": {"layers.0.mlp.up_proj": 9.5, ".*down_proj": 1},
    },
    "one projection of one layer": {"target_modules": r".*\.1\.mlp\.up_proj", "r": 2},
}


def gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES))


def gemma3_with_images():
    config = transformers.Gemma3Config(text_config=SIZES, vision_config=VISION)
    return transformers.Gemma3ForConditionalGeneration(config)


def adapted(tmp_path, make=gemma2, **settings):
    """Saves a model and random adapters of it. Returns the adapted model and the two folders."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "model")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "model", tmp_path / "adapter"


def require_same_mlps(model, layers, config):
    rng = np.random.default_rng(0)
    found = [module for name, module in model.named_modules() if name.endswith(".mlp") and hasattr(module, "gate_proj")]
    assert len(found) == len(layers)
    for theirs, ours in zip(found, layers):
        x = rng.normal(size=(2, 5, config.embed_dim)).astype("float32")
        expected = theirs(torch.tensor(x)).detach().double().numpy()
        without = mlp(remove_lora(ours.mlp), jnp.asarray(x), config)
        assert relative_error(mlp(ours.mlp, jnp.asarray(x), config), expected) <= BOUND
        if any(hasattr(weight, "lora_a") for weight in vars(ours.mlp).values()):
            assert relative_error(without, expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_computes_the_same_here_and_ours_loads_there(kind, tmp_path):
    model, folder, adapter = adapted(tmp_path, **KINDS[kind])
    config, _ = checkpoint.read_config(folder)
    adapters = checkpoint.read_adapters(adapter)
    layers = layouts.insert_adapters(checkpoint.read_huggingface(folder), adapters)
    require_same_mlps(model, layers, config)

    checkpoint.write_adapters(tmp_path / "ours", layouts.extract_adapters(layers), base_model=str(folder))
    base = transformers.Gemma2ForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    theirs, ours = dict(named_adapters(model)), dict(named_adapters(again))
    assert ours.keys() == theirs.keys() and ours
    for name, (a, b, factor) in theirs.items():
        assert torch.equal(ours[name][0], a) and torch.equal(ours[name][1], b) and ours[name][2] == factor
    require_same_mlps(again, layers, config)


def named_adapters(model):
    for name, module in model.named_modules():
        if ".mlp." in name and isinstance(module, peft.tuners.lora.Linear):
            yield name, (module.lora_A.default.weight, module.lora_B.default.weight, module.scaling["default"])


def test_adapters_of_a_multimodal_model(tmp_path):
    targets = r".*language_model.*\.(gate|up|down)_proj"
    model, folder, adapter = adapted(tmp_path, gemma3_with_images, target_modules=targets, r=4)
    config, _ = checkpoint.read_config(folder)
    layers = layouts.insert_adapters(checkpoint.read_huggingface(folder), checkpoint.read_adapters(adapter))
    require_same_mlps(model, layers, config)

    adapters = layouts.extract_adapters(layers)
    checkpoint.write_adapters(tmp_path / "ours", adapters, prefix="model.language_model.")
    base = transformers.Gemma3ForConditionalGeneration.from_pretrained(folder)
    require_same_mlps(peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval(), layers, config)


def test_dora_is_refused(tmp_path):
    _, _, adapter = adapted(tmp_path, target_modules=MLP, r=4, use_dora=True)
    with pytest.raises(ValueError, match=r"must be of plain LoRA.*DoRA"):
        checkpoint.read_adapters(adapter)
