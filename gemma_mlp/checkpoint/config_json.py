"""What a config.json says of the block. What it leaves out, transformers' config class for its model type says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.checkpoint.addresses import local_folder
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


class Kind(NamedTuple):
    """What a model type says of the block beyond the numbers of a config.json."""

    defaults: Mapping[str, Any]  # of the type's config class
    pre_norm: str = "pre_feedforward_layernorm"  # the name of the norm before the MLP
    post_norm: bool = True  # whether there is a norm after the MLP


MODEL_TYPES = {
    "gemma": Kind(GEMMA, "post_attention_layernorm", post_norm=False),
    "gemma2": Kind(GEMMA2),
    "gemma3_text": Kind(GEMMA2),  # models/gemma3/configuration_gemma3.py, `Gemma3TextConfig`
    "vaultgemma": Kind(GEMMA2, post_norm=False),  # models/vaultgemma/configuration_vaultgemma.py, `VaultGemmaConfig`
    "t5_gemma_module": Kind(GEMMA2),  # models/t5gemma/configuration_t5gemma.py, `T5GemmaModuleConfig`
    "t5gemma2_text": Kind(GEMMA2),  # models/t5gemma2/configuration_t5gemma2.py, `T5Gemma2TextConfig`
    "t5gemma2_decoder": Kind(GEMMA2),  # the same file, `T5Gemma2DecoderConfig`
}
# Models of several parts: where a config.json holds the values of each stack of layers, and the type of that stack.
NESTED: dict[str, dict[str | None, tuple[str, Any]]] = {
    "gemma3": {None: ("text_config", "gemma3_text")},
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
    return read_kind(folder, part)[1]


def read_kind(folder: str | Path, part: str | None) -> tuple[Kind, Model]:
    """What the model type and the numbers in a config.json say. The errors are those of :func:`read_config`."""
    path = local_folder(folder) / "config.json"
    adapter = path.with_name("adapter_config.json")
    if adapter.exists() and not path.exists():
        raise ValueError(
            f"{path.parent} must hold a whole model. Got: {read_json(adapter).get('peft_type')} adapters of "
            f"{read_json(adapter).get('base_model_name_or_path')}, as {adapter.name} says. Fix: merge them into that "
            "model and save it: PeftModel.merge_and_unload() and save_pretrained()."
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
        config = MLPConfig(
            values["hidden_size"],
            values["intermediate_size"],
            activation=NAMES[activation],
            dropout_rate=whole.get("dropout_rate", 0.0) if part else 0.0,  # T5Gemma has one for both parts
            norm_eps=values["rms_norm_eps"],
            post_norm=kind.post_norm,
        )
        return kind, Model(config, positive_int("num_hidden_layers", values["num_hidden_layers"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
