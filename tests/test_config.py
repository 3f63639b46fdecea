"""The presets have the published sizes, and a config refuses wrong values."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import PRESETS, MLPConfig, MLPParams, feed_forward, sharding

PUBLISHED = {  # name: (embed_dim, hidden_dim, post_norm, scale_plus_one), written out again from the sources
    "gemma1_2b": (2048, 16384, False, True),
    "gemma1_7b": (3072, 24576, False, True),
    "gemma2_2b": (2304, 9216, True, True),
    "gemma2_9b": (3584, 14336, True, True),
    "gemma2_27b": (4608, 36864, True, True),
    "gemma3_270m": (640, 2048, True, True),
    "gemma3_1b": (1152, 6912, True, True),
    "gemma3_4b": (2560, 10240, True, True),
    "gemma3_12b": (3840, 15360, True, True),
    "gemma3_27b": (5376, 21504, True, True),
    "embeddinggemma_300m": (768, 1152, True, True),
    "t5gemma_s": (512, 1024, True, True),
    "t5gemma_b": (768, 2048, True, True),
    "t5gemma_l": (1024, 2816, True, True),
    "t5gemma_ml": (1152, 6912, True, True),
    "t5gemma_xl": (2048, 5120, True, True),
    "vaultgemma_1b": (1152, 6912, False, True),
    "gemma3n_e2b": (2048, 8192, True, False),
    "gemma3n_e4b": (2048, 16384, True, False),
    "gemma4_e2b": (1536, 6144, True, False),
    "gemma4_e2b_wide": (1536, 12288, True, False),
    "gemma4_e4b": (2560, 10240, True, False),
    "gemma4_12b": (3840, 15360, True, False),
    "gemma4_31b": (5376, 21504, True, False),
}

GEMMA2 = {  # name: (layers, heads, kv heads, head_dim, MLP parameters per layer, non-embedding parameters)
    "gemma2_2b": (26, 8, 4, 256, 63_700_992, 2_024_517_888),
    "gemma2_9b": (42, 16, 8, 256, 154_140_672, 8_324_201_984),
    "gemma2_27b": (46, 32, 16, 128, 509_607_936, 26_047_480_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_values(name):
    embed_dim, hidden_dim, post_norm, scale_plus_one = PUBLISHED[name]
    assert PRESETS[name] == MLPConfig(
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        activation="gelu_tanh",
        use_bias=False,
        dropout_rate=0.0,
        dtype="bfloat16",
        param_dtype="float32",
        norm_eps=1e-6,
        post_norm=post_norm,
        scale_plus_one=scale_plus_one,
    )


def test_there_are_no_other_presets():
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", GEMMA2)
def test_gemma2_models_have_the_published_parameter_totals(name):
    layers, heads, kv_heads, head_dim, per_layer, total = GEMMA2[name]
    config = PRESETS[name]
    shapes = jax.eval_shape(lambda key: MLPParams.init(config, key), jax.random.key(0))
    mlp = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    attention = config.embed_dim * head_dim * 2 * (heads + kv_heads)
    assert mlp == per_layer
    assert layers * (mlp + attention + 4 * config.embed_dim) + config.embed_dim == total


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(KeyError, match=r"'gemma2_3b'.*gemma2_2b, gemma2_9b, gemma2_27b"):
        PRESETS["gemma2_3b"]
    assert "gemma2_3b" not in PRESETS
    assert PRESETS.get("gemma2_3b") is None


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["gemma2_2b"] = MLPConfig(1, 1)  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("embed_dim", 0, r"embed_dim must be a whole number of at least 1.*: 0\. Fix: "),
        ("embed_dim", -1, ": -1"),
        ("hidden_dim", 0, "hidden_dim must be a whole number"),
        ("hidden_dim", 2.5, ": 2.5"),
        ("hidden_dim", "9216", ": '9216'"),
        ("hidden_dim", True, ": True"),
        (
            "activation",
            "swish",
            "activation must be one of gelu_tanh, gelu, silu, relu, sigmoid, identity.*: 'swish'",
        ),
        ("activation", None, ": None"),
        ("use_bias", 1, "use_bias must be True or False.*: 1"),
        ("post_norm", "no", "post_norm must be True or False"),
        ("scale_plus_one", 0, "scale_plus_one must be True or False.*: 0"),
        ("dropout_rate", 1.0, r"dropout_rate must be a number in \[0, 1\).*: 1.0"),
        ("dropout_rate", -0.1, ": -0.1"),
        ("dropout_rate", float("nan"), ": nan"),
        ("dtype", "float16", "65504"),
        ("dtype", "int8", "dtype must be one of bfloat16, float32, float64.*: int8"),
        ("dtype", "bf16", ": 'bf16'"),
        ("param_dtype", None, "param_dtype must be one of"),
        ("param_dtype", jnp.float16, "param_dtype must not be float16"),
        ("norm_eps", 0.0, "norm_eps must be a positive finite number.*: 0.0"),
        ("norm_eps", float("inf"), ": inf"),
        ("save", "everything", "save must be one of input, gate_up, autodiff.*: 'everything'"),
    ],
)
def test_wrong_values_raise_at_construction(field, value, message):
    arguments = {"embed_dim": 4, "hidden_dim": 8, field: value}
    with pytest.raises(ValueError, match=message):
        MLPConfig(**arguments)


def test_dtypes_are_canonical_whatever_way_they_are_given():
    assert MLPConfig(4, 8, dtype=jnp.bfloat16) == MLPConfig(4, 8, dtype="bfloat16")
    assert MLPConfig(4, 8, param_dtype=np.dtype("float32")).param_dtype == "float32"
    assert MLPConfig(np.int64(4), 8) == MLPConfig(4, 8)


def test_config_is_frozen_hashable_replaceable_and_picklable():
    config = PRESETS["gemma2_2b"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.embed_dim = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(config) == hash(dataclasses.replace(config))
    assert dataclasses.replace(config, dtype=None).dtype is None
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="hidden_dim"):
        dataclasses.replace(config, hidden_dim=0)


def test_axis_rules_may_have_been_through_json():
    config = MLPConfig(8, 16, axis_rules=sharding.RULES)
    again = MLPConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
    lists = json.loads(json.dumps(sharding.RULES))
    specs = MLPParams.specs(config)
    assert sharding.named_shardings(specs, mesh, lists) == sharding.named_shardings(specs, mesh, sharding.RULES)
    assert sharding.activation_sharding((2, 8), mesh, lists) == sharding.activation_sharding((2, 8), mesh)
    feed_forward(MLPParams.init(config, jax.random.key(0)), jnp.ones((2, 8)), axis_rules=lists)
