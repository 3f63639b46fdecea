"""What a config.json says of the block. What it leaves out, transformers' config class for its model type says."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.checkpoint.addresses import local_folder
from gemma_mlp.checkpoint.loading import choose_layers
from gemma_mlp.checkpoint.safetensors_folder import read_json
from gemma_mlp.checks import describe, positive_int, require, require_choice
from gemma_mlp.config import MLPConfig

# `hidden_activation` or `hidden_act` of a config.json: the names of transformers' ACT2FN.
NAMES: dict[str, Activation] = {a.huggingface: name for name, a in ACTIVATIONS.items() if a.huggingface is not None}
# Defaults are those of transformers 5.24. models/gemma/configuration_gemma.py, `GemmaConfig`:
GEMMA = {"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28}
GEMMA |= {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
# models/gemma2/configuration_gemma2.py, `Gemma2Config`. The classes of most later models repeat these numbers.
GEMMA2 = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
GEMMA2 |= {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
# models/gemma3n/configuration_gemma3n.py, `Gemma3nTextConfig`. Of more than 10 layers, the first 10 are sparse to 0.95.
GEMMA3N = GEMMA2 | {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 35}
GEMMA3N |= {"activation_sparsity_pattern": None}
SPARSE_LAYERS, SPARSITY = 10, 0.95
# models/gemma4/configuration_gemma4.py, `Gemma4TextConfig`
GEMMA4 = GEMMA2 | {"num_hidden_layers": 30, "num_kv_shared_layers": 0, "use_double_wide_mlp": False}
GEMMA4 |= {"enable_moe_block": False}


class Kind(NamedTuple):
    """What a model type says of the block beyond the numbers of a config.json."""

    defaults: Mapping[str, Any]  # of the type's config class
    pre_norm: str = "pre_feedforward_layernorm"  # the name of the norm before the MLP
    post_norm: bool = True  # whether there is a norm after the MLP
    scale_plus_one: bool = True  # whether the norms multiply by 1 + w instead of w


MODEL_TYPES = {
    "gemma": Kind(GEMMA, "post_attention_layernorm", post_norm=False),
    "gemma2": Kind(GEMMA2),
    "gemma3_text": Kind(GEMMA2),  # models/gemma3/configuration_gemma3.py, `Gemma3TextConfig`
    "gemma3n_text": Kind(GEMMA3N, scale_plus_one=False),
    "gemma4_text": Kind(GEMMA4, scale_plus_one=False),
    "gemma4_unified_text": Kind(GEMMA4, scale_plus_one=False),  # models/gemma4_unified/, `Gemma4UnifiedTextConfig`
    "vaultgemma": Kind(GEMMA2, post_norm=False),  # models/vaultgemma/configuration_vaultgemma.py, `VaultGemmaConfig`
    "t5_gemma_module": Kind(GEMMA2),  # models/t5gemma/configuration_t5gemma.py, `T5GemmaModuleConfig`
    "t5gemma2_text": Kind(GEMMA2),  # models/t5gemma2/configuration_t5gemma2.py, `T5Gemma2TextConfig`
    "t5gemma2_decoder": Kind(GEMMA2),  # the same file, `T5Gemma2DecoderConfig`
}
# Models of several parts: where a config.json holds the values of each stack of layers, and the type of that stack.
NESTED: dict[str, dict[str | None, tuple[str, Any]]] = {
    "gemma3": {None: ("text_config", "gemma3_text")},
    "gemma3n": {None: ("text_config", "gemma3n_text")},
    "gemma4": {None: ("text_config", "gemma4_text")},
    "gemma4_unified": {None: ("text_config", "gemma4_unified_text")},
    "shieldgemma2": {None: ("text_config", "gemma3_text")},
    "paligemma": {None: ("text_config", "gemma")},
    "t5gemma": {"encoder": ("encoder", "t5_gemma_module"), "decoder": ("decoder", "t5_gemma_module")},
    "t5gemma2": {"encoder": ("encoder.text_config", "t5gemma2_text"), "decoder": ("decoder", "t5gemma2_decoder")},
}


class Model(NamedTuple):
    """What a config.json says."""

    config: MLPConfig
    num_layers: int


def read_config(folder: str | Path, *, part: str | None = None) -> Model:
    """The block's config and the number of layers, from the config.json of a Hugging Face folder.

    A value that the file leaves out is the default of transformers' config class for that model type.
    `hidden_activation` takes precedence over `hidden_act`. In Gemma 1, "gelu" means the tanh form, as in transformers.

    Args:
      folder: as for :func:`read_huggingface`.
      part: of a T5Gemma: "encoder" or "decoder". Other models have one stack of layers; None.

    Raises:
      ValueError: if the file is missing, belongs to another model, or has an unknown value.
    """
    configs = read_kind(folder, part)[1]
    if len(set(configs)) == 1:
        return Model(require_block(configs, 0), len(configs))
    found = dict.fromkeys(f"hidden_dim {of.hidden_dim}" if isinstance(of, MLPConfig) else of for of in configs)
    raise ValueError(
        f"read_config needs layers that are all alike. Got: {', '.join(found)}. "
        "Fix: read_configs gives the config of each layer, and its layers= chooses some."
    )


def read_configs(
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    part: str | None = None,
    allow_activation_sparsity: bool = False,
) -> list[MLPConfig]:
    """The block's config in each of the `layers`, by default in all: in Gemma 3n and 4 they differ.

    The arguments are those of :func:`read_huggingface`.

    Raises:
      ValueError: as :func:`read_config`, or if one of the layers computes what this block does not.
    """
    configs = read_kind(folder, part, allow_activation_sparsity)[1]
    return [require_block(configs, number) for number in choose_layers(len(configs), layers)]


def require_block(configs: Sequence[MLPConfig | str], number: int) -> MLPConfig:
    """The config of a layer. Raises ValueError if it is no config, but says what the layer computes instead."""
    config = configs[number]
    if isinstance(config, MLPConfig):
        return config
    raise ValueError(
        f"Layer {number} must compute this block. Got: {config}. Fix: choose others with layers=. For those with a "
        "threshold, allow_activation_sparsity=True; checkpoint/README.md has the function that computes them."
    )


def read_kind(
    folder: str | Path, part: str | None, allow_activation_sparsity: bool = False
) -> tuple[Kind, list[MLPConfig | str]]:
    """What the model type and the config.json say: of each layer, its config, or what it computes instead of the block.

    The errors are those of :func:`read_config`.
    """
    path = local_folder(folder) / "config.json"
    adapter = path.with_name("adapter_config.json")
    if adapter.exists() and not path.exists():
        raise ValueError(
            f"{path.parent} must hold a whole model. Got: {read_json(adapter).get('peft_type')} adapters of "
            f"{read_json(adapter).get('base_model_name_or_path')}, as {adapter.name} says. Fix: read that model, and "
            "the adapters with read_adapters; or merge them: PeftModel.merge_and_unload() and save_pretrained()."
        )
    values: Any = read_json(path)
    fix = "give the folder of the whole model, with the config.json that came with it."
    require("model_type" in values, f"{path} must have a model_type.", ", ".join(values) or "nothing", fix)
    outer, whole = values["model_type"], values
    alone: dict[str | None, tuple[str, Any]] = {None: ("", outer)}
    parts = NESTED.get(outer, alone) if isinstance(outer, str) else alone
    require(
        part in parts,
        f"part must be {' or '.join(map(repr, parts))}, as {path} is of model_type {outer!r}.",
        repr(part),
        "choose the stack of layers with part=.",
    )
    keys, model_type = parts[part]
    for key in keys.split(".") if keys else ():
        values = values.get(key)
        require(isinstance(values, dict), f"{path} must have a {keys} for its layers.", describe(values), fix)
    values = {"model_type": model_type, **values}
    model_type = values["model_type"]
    require_choice(f"model_type in {path}", model_type, MODEL_TYPES if keys else (*MODEL_TYPES, *NESTED))
    kind = MODEL_TYPES[model_type]
    values = {**kind.defaults, **values}
    activation: Any = values.get("hidden_activation") or values.get("hidden_act")
    require_choice(f"hidden_activation, or else hidden_act, in {path}", activation, NAMES)
    if (model_type, activation) == ("gemma", "gelu"):
        activation = "gelu_pytorch_tanh"
    try:
        num_layers = positive_int("num_hidden_layers", values["num_hidden_layers"])
        config = MLPConfig(
            values["hidden_size"],
            1,
            activation=NAMES[activation],
            dropout_rate=whole.get("dropout_rate", 0.0) if part else 0.0,  # T5Gemma has one for both parts
            norm_eps=values["rms_norm_eps"],
            post_norm=kind.post_norm,
            scale_plus_one=kind.scale_plus_one,
        )
        widths = _of_each_layer("intermediate_size", values["intermediate_size"], num_layers)
        if "use_double_wide_mlp" in kind.defaults and values["use_double_wide_mlp"]:
            shared = values["num_kv_shared_layers"]
            shared = 0 if shared == 0 else positive_int("num_kv_shared_layers", shared)
            widths = [width * (2 if i >= num_layers - shared else 1) for i, width in enumerate(widths)]
        sparsity = values["activation_sparsity_pattern"] if "activation_sparsity_pattern" in kind.defaults else 0
        if sparsity is None:
            sparsity = [SPARSITY if num_layers > SPARSE_LAYERS > i else 0 for i in range(num_layers)]
        sparsity = _of_each_layer("activation_sparsity_pattern", sparsity, num_layers)
        configs = [dataclasses.replace(config, hidden_dim=width) for width in widths]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if kind.defaults.get("enable_moe_block") is not None and values["enable_moe_block"]:
        return kind, ["a mixture of experts (enable_moe_block)"] * num_layers
    threshold = "a threshold on the gate (activation_sparsity_pattern {})"
    shares = [0] * num_layers if allow_activation_sparsity else sparsity
    return kind, [threshold.format(share) if share else config for config, share in zip(configs, shares)]


def _of_each_layer(name: str, value: Any, num_layers: int) -> list[Any]:
    """A value for each layer, from a list of them or from one for all."""
    values = value if isinstance(value, list) else [value] * num_layers
    fix = "give one for each layer, or one for all."
    require(len(values) == num_layers, f"{name} must have {num_layers} numbers.", str(len(values)), fix)
    return values
