"""The config.json files of Gemma 1, 2 and 3 give the block's config; files with unknown values are refused."""

import dataclasses
import json

import pytest

from gemma_mlp import MLPConfig, checkpoint
from gemma_mlp.checkpoint import config_json
from tests.support.by_hand import LAYERS, D, F
from tests.support.huggingface_folder import SETTINGS

GEMMA1 = {name: value for name, value in SETTINGS.items() if name != "hidden_activation"} | {"model_type": "gemma"}
CONFIGS = {  # name: (config.json, activation, post_norm)
    "Gemma 2": (SETTINGS, "gelu_tanh", True),
    "Gemma 1, as released": (GEMMA1 | {"hidden_act": "gelu", "hidden_activation": None}, "gelu_tanh", False),
    "hidden_activation first": (SETTINGS | {"hidden_act": "relu"}, "gelu_tanh", True),
    "hidden_act alone": (SETTINGS | {"hidden_act": "silu", "hidden_activation": None}, "silu", True),
    "erf": (SETTINGS | {"hidden_activation": "gelu"}, "gelu", True),
    "Gemma 3": (SETTINGS | {"model_type": "gemma3_text"}, "gelu_tanh", True),
    "Gemma 3 with images": (
        {"model_type": "gemma3", "hidden_size": 99, "text_config": SETTINGS | {"model_type": "gemma3_text"}},
        "gelu_tanh",
        True,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(tmp_path, name):
    settings, activation, post_norm = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    expected = MLPConfig(D, F, activation=activation, post_norm=post_norm, norm_eps=1e-6)
    assert checkpoint.read_config(tmp_path) == (expected, LAYERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "llama"},
            r"model_type in .*config.json .* one of gemma, gemma2, gemma3_text, .*gemma3, .*\. \w+: 'llama'",
        ),
        ({"model_type": None}, r"\w+: None"),
        ({"model_type": "gemma3"}, "must have a text_config"),
        ({"hidden_activation": "gelu_new"}, r"hidden_activation, or else hidden_act, in .*\w+: 'gelu_new'"),
        ({"hidden_activation": None}, r"hidden_activation.*\w+: None"),
        ({"hidden_activation": ["gelu"]}, r"\w+: \['gelu'\]"),
        ({"hidden_size": "64"}, r"config.json: embed_dim .* a whole number.*\w+: '64'"),
        ({"intermediate_size": 0}, "config.json: hidden_dim .* a whole number"),
        ({"num_hidden_layers": -1}, "config.json: num_hidden_layers .* a whole number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers .* a whole number"),
        ({"rms_norm_eps": "small"}, r"norm_eps .* a positive finite number. \w+: 'small'"),
    ],
)
def test_a_config_with_unknown_values_is_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | change))
    with pytest.raises(ValueError, match=message):
        checkpoint.read_config(tmp_path)


GEMMA2 = (2304, 9216, 26, "gelu_tanh", 1e-6, True, True)  # Gemma2Config of transformers; later classes repeat it
# model_type: D, F, layers, activation, eps, post_norm and scale_plus_one where a config.json says nothing else
DEFAULTS = {
    "gemma": (3072, 24576, 28, "gelu_tanh", 1e-6, False, True),  # GemmaConfig
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gemma3n_text": (2048, 16384, 35, "gelu_tanh", 1e-6, True, False),
    "gemma4_text": (2304, 9216, 30, "gelu_tanh", 1e-6, True, False),
    "gemma4_unified_text": (2304, 9216, 30, "gelu_tanh", 1e-6, True, False),
    "vaultgemma": (*GEMMA2[:-2], False, True),
    "t5_gemma_module": GEMMA2,
    "t5gemma2_text": GEMMA2,
    "t5gemma2_decoder": GEMMA2,
}
NESTED = {  # model_type, part: the keys that lead to the values of its layers, their type
    ("gemma3", None): (["text_config"], "gemma3_text"),
    ("gemma3n", None): (["text_config"], "gemma3n_text"),
    ("gemma4", None): (["text_config"], "gemma4_text"),
    ("gemma4_unified", None): (["text_config"], "gemma4_unified_text"),
    ("shieldgemma2", None): (["text_config"], "gemma3_text"),
    ("paligemma", None): (["text_config"], "gemma"),
    ("t5gemma", "encoder"): (["encoder"], "t5_gemma_module"),
    ("t5gemma", "decoder"): (["decoder"], "t5_gemma_module"),
    ("t5gemma2", "encoder"): (["encoder", "text_config"], "t5gemma2_text"),
    ("t5gemma2", "decoder"): (["decoder"], "t5gemma2_decoder"),
}


def test_every_model_type_has_literal_defaults():
    assert set(DEFAULTS) == set(config_json.MODEL_TYPES)


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_what_a_config_leaves_out_is_the_default_of_its_class(tmp_path, model_type):
    embed_dim, hidden_dim, num_layers, activation, norm_eps, post_norm, scale_plus_one = DEFAULTS[model_type]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    norms = {"norm_eps": norm_eps, "post_norm": post_norm, "scale_plus_one": scale_plus_one}
    expected = MLPConfig(embed_dim, hidden_dim, activation=activation, **norms)
    if model_type == "gemma3n_text":  # its first ten layers compute something else
        assert checkpoint.read_configs(tmp_path, layers=range(10, num_layers)) == [expected] * (num_layers - 10)
    else:
        assert checkpoint.read_config(tmp_path) == (expected, num_layers)
        assert checkpoint.read_configs(tmp_path) == [expected] * num_layers
    said = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS}  # geometry alone
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | said))
    expected = dataclasses.replace(expected, embed_dim=D, hidden_dim=F)
    assert checkpoint.read_config(tmp_path) == (expected, LAYERS)


def nest(outer, keys, values):
    for key in reversed(keys):
        values = {key: values}
    return {"model_type": outer} | values


@pytest.mark.parametrize(("outer", "part"), NESTED)
def test_a_nested_config_has_defaults_too(tmp_path, outer, part):
    """As the released config.json files of Gemma 3 4B, 12B and 27B, which state the geometry and little else."""
    keys, inner = NESTED[outer, part]
    stated = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    norms = dict(zip(("post_norm", "scale_plus_one"), DEFAULTS[inner][-2:]))
    expected = MLPConfig(2560, 10240, activation="gelu_tanh", norm_eps=1e-6, **norms)
    for model_type in ({}, {"model_type": inner}):
        (tmp_path / "config.json").write_text(json.dumps(nest(outer, keys, stated | model_type)))
        first = 10 if outer == "gemma3n" else 0
        assert checkpoint.read_configs(tmp_path, layers=range(first, 34), part=part) == [expected] * (34 - first)
    with pytest.raises(ValueError, match=rf"part must be .*{outer}.*choose the stack of layers with part="):
        checkpoint.read_config(tmp_path, part=None if part else "encoder")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": outer}))
    with pytest.raises(ValueError, match=rf"must have a {'.'.join(keys)}"):
        checkpoint.read_config(tmp_path, part=part)


def read_configs(path, **values):
    (path / "config.json").write_text(json.dumps({"hidden_size": D, "intermediate_size": F} | values))
    return checkpoint.read_configs(path)


def test_widths_that_differ_from_layer_to_layer(tmp_path):
    """Gemma 3n lists them. In Gemma 4 E2B, the layers that share keys and values are twice as wide."""
    narrow, wide = (MLPConfig(D, hidden_dim, scale_plus_one=False) for hidden_dim in (F, 2 * F))
    named = {"model_type": "gemma3n_text", "num_hidden_layers": 3, "intermediate_size": [F, 2 * F, F]}
    assert read_configs(tmp_path, **named) == [narrow, wide, narrow]
    with pytest.raises(ValueError, match=r"all alike\. Got: hidden_dim 6, hidden_dim 12\. .*read_configs"):
        checkpoint.read_config(tmp_path)
    assert checkpoint.read_configs(tmp_path, layers=[1]) == [wide]
    with pytest.raises(ValueError, match=r"layers 0 to 2, each once"):
        checkpoint.read_configs(tmp_path, layers=[3])
    with pytest.raises(ValueError, match=r"intermediate_size must have 4 numbers\. Got: 3\."):
        read_configs(tmp_path, **named | {"num_hidden_layers": 4})
    for model_type in ("gemma4_text", "gemma4_unified_text"):
        named = {"model_type": model_type, "num_hidden_layers": 35, "num_kv_shared_layers": 20}
        got = read_configs(tmp_path, **named, use_double_wide_mlp=True)
        assert got == [narrow] * 15 + [wide] * 20
        assert read_configs(tmp_path, **named) == [narrow] * 35
        none_shared = named | {"num_kv_shared_layers": 0}
        assert read_configs(tmp_path, **none_shared, use_double_wide_mlp=True) == [narrow] * 35
        with pytest.raises(ValueError, match="num_kv_shared_layers must be a whole number"):
            read_configs(tmp_path, **named | {"num_kv_shared_layers": "20"}, use_double_wide_mlp=True)
    named = {"model_type": "gemma2", "num_hidden_layers": 2, "num_kv_shared_layers": 1, "use_double_wide_mlp": True}
    assert read_configs(tmp_path, **named) == [MLPConfig(D, F)] * 2  # names that mean nothing in Gemma 2


def test_layers_that_compute_something_else_are_refused_by_name(tmp_path):
    named, dense = {"model_type": "gemma3n_text", "num_hidden_layers": 12}, MLPConfig(D, F, scale_plus_one=False)
    message = r"Layer 0 must compute this block\. Got: a threshold on the gate \(activation_sparsity_pattern 0.95\)"
    for said in ({}, {"activation_sparsity_pattern": [0.95] * 10 + [0.0] * 2}):
        with pytest.raises(ValueError, match=message):
            read_configs(tmp_path, **named, **said)
        assert checkpoint.read_configs(tmp_path, layers=[11, 10]) == [dense] * 2
        with pytest.raises(ValueError, match=r"all alike\. Got: a threshold .* hidden_dim 6"):
            checkpoint.read_config(tmp_path)
    assert read_configs(tmp_path, **named, activation_sparsity_pattern=[0.0] * 12) == [dense] * 12
    assert read_configs(tmp_path, **named | {"num_hidden_layers": 10}) == [dense] * 10  # all dense, as theirs
    with pytest.raises(ValueError, match=r"Layer 0 .* Got: a mixture of experts \(enable_moe_block\)\."):
        read_configs(tmp_path, model_type="gemma4_text", num_hidden_layers=2, enable_moe_block=True)
    with pytest.raises(ValueError, match=r"Layer 0 .* Got: a mixture of experts \(enable_moe_block\)\."):
        checkpoint.read_config(tmp_path)


def test_there_are_no_other_nested_types():
    assert set(NESTED) == {(outer, part) for outer, parts in config_json.NESTED.items() for part in parts}


def test_paligemma_2_says_that_its_language_model_is_gemma_2(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma", "text_config": SETTINGS}))
    assert checkpoint.read_config(tmp_path) == (MLPConfig(D, F), LAYERS)


def test_t5gemma_has_one_dropout_rate_for_both_parts(tmp_path):
    """transformers overwrites that of each part by it. In other models the name means nothing."""
    part = SETTINGS | {"model_type": "t5_gemma_module", "dropout_rate": 0.5}
    values = {"model_type": "t5gemma", "encoder": part, "decoder": part}
    for said, expected in (({}, 0.0), ({"dropout_rate": 0.1}, 0.1)):
        (tmp_path / "config.json").write_text(json.dumps(values | said))
        for name in ("encoder", "decoder"):
            assert checkpoint.read_config(tmp_path, part=name).config.dropout_rate == expected
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"dropout_rate": 0.5}))
    assert checkpoint.read_config(tmp_path).config.dropout_rate == 0


def test_a_default_stands_for_no_value_that_is_there(tmp_path):
    """A null is a value. transformers ignores `hidden_act` in Gemma 2 and later, unless the other is null."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", "hidden_act": "silu"}))
    assert checkpoint.read_config(tmp_path).config.activation == "gelu_tanh"
    for name in ("hidden_size", "rms_norm_eps", "hidden_activation"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", name: None}))
        with pytest.raises(ValueError, match="None"):
            checkpoint.read_config(tmp_path)


def test_a_config_that_lacks_its_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({key: SETTINGS[key] for key in SETTINGS if key != "model_type"}))
    with pytest.raises(ValueError, match=r"config.json must have a model_type.*give the folder of the whole model"):
        checkpoint.read_config(tmp_path)
