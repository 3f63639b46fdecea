"""The config.json files of Gemma 1, 2 and 3 give the block's config; files with unknown values are refused."""

import json

import pytest

from gemma_mlp import MLPConfig, checkpoint
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
            r"model_type in .*config.json .* one of gemma, gemma2, gemma3_text. \w+: 'llama'",
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


@pytest.mark.parametrize(
    "name", ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"]
)
def test_a_config_that_lacks_a_value_is_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({key: SETTINGS[key] for key in SETTINGS if key != name}))
    with pytest.raises(ValueError, match=f"config.json must have a {name}"):
        checkpoint.read_config(tmp_path)
