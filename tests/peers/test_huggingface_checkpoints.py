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

import gemma_mlp
from gemma_mlp import checkpoint, mlp_block
from gemma_mlp.checkpoint import config_json
from gemma_mlp.layouts.trees import block_leaves, make_params
from gemma_mlp.testing.oracle import relative_error
from tests.support import readme

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


def paligemma(model_type):
    config = transformers.PaliGemmaConfig(
        text_config=SIZES | {"model_type": model_type}, vision_config=VISION, projection_dim=SIZES["hidden_size"]
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def t5gemma():
    decoder = SIZES | {"intermediate_size": 40, "num_hidden_layers": 2}
    return transformers.T5GemmaForConditionalGeneration(transformers.T5GemmaConfig(encoder=SIZES, decoder=decoder))


def t5gemma2():
    encoder = {"text_config": SIZES, "vision_config": VISION}
    decoder = SIZES | {"num_hidden_layers": 2}
    return transformers.T5Gemma2ForConditionalGeneration(transformers.T5Gemma2Config(encoder=encoder, decoder=decoder))


def shieldgemma2():
    config = transformers.ShieldGemma2Config(text_config=SIZES, vision_config=VISION)
    return transformers.ShieldGemma2ForImageClassification(config)


def gemma3n(**sparsity):
    more = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 32, "laurel_rank": 4}
    widths = {"intermediate_size": [48, 64, 48], "num_kv_shared_layers": 0}
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**SIZES | widths | more | sparsity))


def gemma4(model_type="gemma4_text", **more):
    """Its last layer shares keys and values, and is twice as wide."""
    wide = {"use_double_wide_mlp": True, "num_kv_shared_layers": 1}
    wide["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    config = transformers.CONFIG_MAPPING[model_type](**SIZES | wide | more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for i, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.5 + i)
    return model


MODELS = {
    "Gemma 1": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES)),
    "Gemma 2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES)),
    "Gemma 3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES)),
    "Gemma 3 with images": gemma3_with_images,
    "VaultGemma": lambda: transformers.VaultGemmaForCausalLM(transformers.VaultGemmaConfig(**SIZES)),
    "PaliGemma": lambda: paligemma("gemma"),
    "PaliGemma 2": lambda: paligemma("gemma2"),
    "ShieldGemma 2": shieldgemma2,
    "Gemma 3n": gemma3n,
    "Gemma 4": lambda: gemma4(hidden_size_per_layer_input=0),
    "Gemma 4 unified": lambda: gemma4("gemma4_unified_text"),
    "T5Gemma": t5gemma,
    "T5Gemma 2": t5gemma2,
}
PARTS = {"T5Gemma": ("encoder", "decoder"), "T5Gemma 2": ("encoder", "decoder")}


def make(name, dtype="float32"):
    """A model with random parameters, norms included."""
    torch.manual_seed(0)
    return randomise(MODELS[name]()).to(getattr(torch, dtype)).eval()


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def save(model, folder, sharded):
    model.save_pretrained(folder, **({"max_shard_size": "20kB"} if sharded else {}))
    assert len(list(folder.glob("*.safetensors"))) > 1 if sharded else (folder / "model.safetensors").exists()


def parts_of(name):
    return PARTS.get(name, (None,))


def their_layers(model, part):
    """The layers of the language model, or of a part of it."""
    stack = model.model
    for attribute in ("model", part or "language_model", "text_model"):
        stack = getattr(stack, attribute, stack)
    return stack.layers


def logits(model):
    tokens = {"input_ids": torch.arange(12)[None] % 32}
    tokens["output_hidden_states"] = True  # else transformers 5.24 slices per-layer inputs of Gemma 4 that are None
    if isinstance(model, transformers.ShieldGemma2ForImageClassification):
        model = model.model
    if model.config.is_encoder_decoder:
        tokens["decoder_input_ids"] = tokens["input_ids"] + 1
    with torch.no_grad():
        return model(**tokens).logits


def mlp_half(layer, x):
    """The peer's decoder layer with an attention that returns zeros, so that only the MLP half acts on x."""

    class NoAttention(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return torch.zeros_like(hidden_states), *([None] * outputs)

    if type(layer).__name__ == "Gemma3nTextDecoderLayer":  # the half is in the middle of it
        return x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    outputs = 2 if type(layer).__name__ == "T5Gemma2DecoderLayer" else 1
    for attention in {"self_attn", "cross_attn"} & set(dict(layer.named_children())):
        setattr(layer, attention, NoAttention())
    more = {} if outputs == 1 else {"merged_attention_mask": None, "encoder_hidden_states": x}
    output = layer(x, position_embeddings=(x, x), position_ids=torch.arange(x.shape[1])[None], **more)
    return output[0] if isinstance(output, tuple) else output


def theirs_by_leaf(layer):
    """Their parameters of the MLP half by the names of ours."""
    named = dict(layer.named_parameters())
    norms = [name for name in named if "feedforward_layernorm" in name] or ["post_attention_layernorm.weight"]
    leaves = {f"{name.partition('_')[0]}_norm": named[name] for name in norms}
    if "pre_norm" not in leaves:  # Gemma 1
        leaves = {"pre_norm": leaves["post_norm"]}
    return leaves | {name: named[f"mlp.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("model_type", config_json.MODEL_TYPES)
def test_the_defaults_are_those_of_the_peers_config_classes(tmp_path, model_type):
    """Read from files that say less and less, by us and by them."""
    theirs = transformers.CONFIG_MAPPING[model_type]
    geometry = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3}
    for said in ({}, geometry, {"hidden_size": 64}, geometry | {"rms_norm_eps": 1e-5}, {"hidden_act": "silu"}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | said))
        expected = theirs.from_pretrained(tmp_path)
        num_layers = expected.num_hidden_layers
        sparsity = getattr(expected, "activation_sparsity_pattern", [0] * num_layers)
        _, of_all = config_json.read_kind(tmp_path, None)
        assert [isinstance(of_layer, str) for of_layer in of_all] == [share > 0 for share in sparsity]
        dense = [i for i, share in enumerate(sparsity) if share == 0]
        configs = checkpoint.read_configs(tmp_path, layers=dense)
        widths = expected.intermediate_size
        widths = widths if isinstance(widths, list) else [widths] * num_layers
        assert [config.hidden_dim for config in configs] == [widths[i] for i in dense]
        assert {config.embed_dim for config in configs} == {expected.hidden_size}
        assert {config.norm_eps for config in configs} == {expected.rms_norm_eps}
        activation = expected.hidden_act if model_type == "gemma" else expected.hidden_activation
        assert {config.activation for config in configs} == {config_json.NAMES[activation]}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_stripped_to_geometry_reads_the_same(tmp_path, name):
    save(make(name), tmp_path, sharded=False)
    read = lambda f: [f(tmp_path, part=part) for part in parts_of(name)]  # noqa: E731
    expected, layers = read(checkpoint.read_configs), read(checkpoint.read_huggingface)
    keys = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers"}
    keys |= {"use_double_wide_mlp", "num_kv_shared_layers"}  # these tell the widths in Gemma 4

    def stripped(values):
        kept = {key: stripped(value) for key, value in values.items() if isinstance(value, dict)}
        return kept | {key: value for key, value in values.items() if key in keys}

    path = tmp_path / "config.json"
    path.write_text(json.dumps(stripped(json.loads(path.read_text()))))
    assert read(checkpoint.read_configs) == expected
    again = read(checkpoint.read_huggingface)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, layers))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_compute_what_the_peer_computes(tmp_path, name, sharded):
    """Values, and gradients of the input and of every parameter."""
    model = make(name)
    save(model, tmp_path, sharded)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, 5, 32)).astype(np.float32) for _ in range(2))
    for part in parts_of(name):
        configs = checkpoint.read_configs(tmp_path, part=part)
        ours, theirs = checkpoint.read_huggingface(tmp_path, part=part), their_layers(model, part)
        assert len(ours) == len(configs) == len(theirs)
        for config, params, layer in zip(configs, ours, theirs):
            scalar = float(getattr(layer, "layer_scalar", 1))  # Gemma 4's stands after the block

            def block(params, x, config=config, scalar=scalar):
                return scalar * mlp_block(params, x, config)

            compare(block, params, layer, x, dy)


def compare(block, params, layer, x, dy):
    torch_x = torch.tensor(x, requires_grad=True)
    expected = mlp_half(layer, torch_x)
    expected.backward(torch.tensor(dy))
    y, pullback = jax.vjp(block, params, jnp.asarray(x))
    dparams, dx = pullback(jnp.asarray(dy))
    assert relative_error(y, expected.detach().double().numpy()) <= BOUND
    assert relative_error(dx, torch_x.grad.double().numpy()) <= BOUND
    gradients = block_leaves(dparams)
    for leaf, parameter in theirs_by_leaf(layer).items():
        assert relative_error(gradients.pop(leaf).T, parameter.grad.double().numpy()) <= BOUND
    assert not gradients


def test_layers_with_a_threshold_by_the_function_in_the_readme(tmp_path):
    """Values and gradients of Gemma 3n's layers, and its logits after all of them were read and written."""
    sparsity = [0.95, 0.5, 0.0]
    blocks = readme.blocks("gemma_mlp/checkpoint/README.md")
    (code,) = (block for block in blocks if "def block_with_threshold" in block)
    session = {"jax": jax, "gemma_mlp": gemma_mlp}
    exec(code, session)
    model = randomise(gemma3n(activation_sparsity_pattern=sparsity))
    save(model, tmp_path, sharded=False)
    with pytest.raises(ValueError, match="a threshold on the gate"):
        checkpoint.read_huggingface(tmp_path)
    allowed = {"allow_activation_sparsity": True}
    configs, layers = checkpoint.read_configs(tmp_path, **allowed), checkpoint.read_huggingface(tmp_path, **allowed)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, 5, 32)).astype(np.float32) for _ in range(2))
    for share, config, params, layer in zip(sparsity, configs, layers, their_layers(model, None), strict=True):

        def block(params, x, share=share, config=config):
            if share == 0:
                return mlp_block(params, x, config)
            return session["block_with_threshold"](params, x, config, share)

        compare(block, params, layer, x, dy)
        expected = mlp_half(layer, torch.tensor(x)).detach().double().numpy()
        wrong = relative_error(mlp_block(params, jnp.asarray(x), config), expected)
        assert (wrong > 0.01) == (share > 0)  # so these layers must be asked for
    expected = logits(reload(model, tmp_path))
    checkpoint.update_huggingface(tmp_path, layers, **allowed)
    assert torch.equal(logits(reload(model, tmp_path)), expected)


@pytest.mark.parametrize(
    ("dtype", "sharded"), [("float32", False), ("bfloat16", True)], ids=["f32, one file", "bf16, sharded"]
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_unchanged_bit_for_bit(tmp_path, name, dtype, sharded):
    """First we write gate as up and up as gate, so that only our second writing can restore the logits."""
    model = make(name, dtype)
    save(model, tmp_path, sharded)
    expected = logits(reload(model, tmp_path))
    for part in parts_of(name):
        layers = checkpoint.read_huggingface(tmp_path, part=part)
        leaves = [block_leaves(layer) for layer in layers]
        swapped = [make_params(of | {"gate_proj": of["up_proj"], "up_proj": of["gate_proj"]}) for of in leaves]
        checkpoint.update_huggingface(tmp_path, swapped, part=part)
        assert not torch.equal(logits(reload(model, tmp_path)), expected)
        checkpoint.update_huggingface(tmp_path, layers, part=part)
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
