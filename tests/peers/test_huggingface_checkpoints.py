"""Models saved by transformers: our blocks compute what theirs do, and their logits survive our writing."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with contextlib.suppress(ModuleNotFoundError):  # then tests/conftest.py leaves these tests out
    import torch
    import transformers

from gemma_mlp import checkpoint, mlp_block
from gemma_mlp.checkpoint import config_json
from gemma_mlp.testing.oracle import relative_error

pytestmark = pytest.mark.needs_peers

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
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
BOUND = 1e-5


def gemma3_with_images():
    config = transformers.Gemma3Config(text_config=SIZES, vision_config=VISION)
    return transformers.Gemma3ForConditionalGeneration(config)


MODELS = {
    "Gemma 1": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES)),
    "Gemma 2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES)),
    "Gemma 3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES)),
    "Gemma 3 with images": gemma3_with_images,
}


def make(name, dtype="float32"):
    """A model with random parameters, norms included."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(getattr(torch, dtype)).eval()


def save(model, folder, sharded):
    model.save_pretrained(folder, **({"max_shard_size": "20kB"} if sharded else {}))
    assert len(list(folder.glob("*.safetensors"))) > 1 if sharded else (folder / "model.safetensors").exists()


def language_model(model):
    return getattr(model.model, "language_model", model.model)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None] % 32).logits


def mlp_half(layer, x):
    """The peer's decoder layer with an attention that returns zeros, so that only the MLP half acts on x."""

    class NoAttention(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return torch.zeros_like(hidden_states), None

    layer.self_attn = NoAttention()
    with torch.no_grad():
        output = layer(x, position_embeddings=(x, x), position_ids=torch.arange(x.shape[1])[None])
    return (output[0] if isinstance(output, tuple) else output).numpy()


@pytest.mark.parametrize("model_type", config_json.MODEL_TYPES)
def test_the_defaults_are_those_of_the_peers_config_classes(tmp_path, model_type):
    """Read from files that say less and less, by us and by them."""
    theirs = transformers.CONFIG_MAPPING[model_type]
    geometry = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3}
    for said in ({}, geometry, {"hidden_size": 64}, geometry | {"rms_norm_eps": 1e-5}, {"hidden_act": "silu"}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | said))
        config, num_layers = checkpoint.read_config(tmp_path)
        expected = theirs.from_pretrained(tmp_path)
        assert num_layers == expected.num_hidden_layers
        assert (config.embed_dim, config.hidden_dim) == (expected.hidden_size, expected.intermediate_size)
        assert config.norm_eps == expected.rms_norm_eps
        activation = expected.hidden_act if model_type == "gemma" else expected.hidden_activation
        assert config.activation == config_json.NAMES[activation]


@pytest.mark.parametrize("name", MODELS)
def test_a_config_stripped_to_geometry_reads_the_same(tmp_path, name):
    save(make(name), tmp_path, sharded=False)
    expected, layers = checkpoint.read_config(tmp_path), checkpoint.read_huggingface(tmp_path)
    keys = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers"}

    def stripped(values):
        kept = {key: stripped(value) for key, value in values.items() if isinstance(value, dict)}
        return kept | {key: value for key, value in values.items() if key in keys}

    path = tmp_path / "config.json"
    path.write_text(json.dumps(stripped(json.loads(path.read_text()))))
    assert checkpoint.read_config(tmp_path) == expected
    again = checkpoint.read_huggingface(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, layers))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_compute_what_the_peer_computes(tmp_path, name, sharded):
    model = make(name)
    save(model, tmp_path, sharded)
    config, num_layers = checkpoint.read_config(tmp_path)
    layers = checkpoint.read_huggingface(tmp_path)
    assert len(layers) == num_layers == SIZES["num_hidden_layers"]
    x = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    for params, layer in zip(layers, language_model(model).layers):
        expected = mlp_half(layer, torch.tensor(x))
        assert relative_error(mlp_block(params, jnp.asarray(x), config), expected.astype(np.float64)) <= BOUND


@pytest.mark.parametrize(
    ("dtype", "sharded"), [("float32", False), ("bfloat16", True)], ids=["f32, one file", "bf16, sharded"]
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_unchanged_bit_for_bit(tmp_path, name, dtype, sharded):
    """First we write the layers in another order, so that only our second writing can restore the logits."""
    model = make(name, dtype)
    save(model, tmp_path, sharded)
    expected = logits(reload(model, tmp_path))
    layers = checkpoint.read_huggingface(tmp_path)
    rotated = layers[1:] + layers[:1]
    checkpoint.update_huggingface(tmp_path, rotated)
    assert not torch.equal(logits(reload(model, tmp_path)), expected)
    checkpoint.update_huggingface(tmp_path, layers)
    again = reload(model, tmp_path)
    assert torch.equal(logits(again), expected)
    for (key, old), new in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(old, new), key


def reload(model, folder):
    return type(model).from_pretrained(folder, dtype=model.dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", ["Gemma 1", "Gemma 2"])
def test_a_new_folder_of_ours_has_the_peers_names_and_shapes(tmp_path, name):
    model = make(name)
    save(model, tmp_path / "theirs", sharded=False)
    config, _ = checkpoint.read_config(tmp_path / "theirs")
    layers = checkpoint.read_huggingface(tmp_path / "theirs")
    checkpoint.write_huggingface(tmp_path / "ours", layers, config)
    from safetensors.torch import load_file

    ours = load_file(tmp_path / "ours" / "model.safetensors")
    state = model.state_dict()
    assert len(ours) == 3 * (5 if name == "Gemma 2" else 4)
    assert all(torch.equal(state[key], tensor) for key, tensor in ours.items())
