"""What a config.json says of the block. What it leaves out, transformers' config class for its model type says."""

from pathlib import Path
from typing import Any, NamedTuple

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.checkpoint.addresses import local_folder
from gemma_mlp.checkpoint.safetensors_folder import read_json
from gemma_mlp.checks import describe, positive_int, require, require_choice
from gemma_mlp.config import MLPConfig

# `hidden_activation` or `hidden_act` of a config.json: the names of transformers' ACT2FN.
NAMES: dict[str, Activation] = {a.huggingface: name for name, a in ACTIVATIONS.items() if a.huggingface is not None}
# The defaults of transformers 5.24, models/gemma/configuration_gemma.py, `GemmaConfig`.
GEMMA = {"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28}
GEMMA |= {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
# models/gemma2/configuration_gemma2.py, `Gemma2Config`. The classes of all later models repeat these numbers.
GEMMA2 = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
GEMMA2 |= {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
MODEL_TYPES = {  # model_type: (the defaults of its class, whether there is a norm after the MLP)
    "gemma": (GEMMA, False),
    "gemma2": (GEMMA2, True),
    "gemma3_text": (GEMMA2, True),  # models/gemma3/configuration_gemma3.py, `Gemma3TextConfig`
}
NESTED = {"gemma3": ("text_config", "gemma3_text")}  # model_type: (where the language model's values are, its type)


class Model(NamedTuple):
    """What a config.json says."""

    config: MLPConfig
    num_layers: int


def read_config(folder: str | Path) -> Model:
    """The block's config and the number of layers, from the config.json of a Hugging Face folder of Gemma 1, 2 or 3.

    A value that the file leaves out is the default of transformers' config class for that model type.
    `hidden_activation` takes precedence over `hidden_act`. In Gemma 1, "gelu" means the tanh form, as in transformers.

    Raises:
      ValueError: if the file is missing, belongs to another model, or has an unknown value.
    """
    path = local_folder(folder) / "config.json"
    values = read_json(path)
    fix = "give the folder of the whole model, with the config.json that came with it."
    require("model_type" in values, f"{path} must have a model_type.", ", ".join(values) or "nothing", fix)
    if values["model_type"] in NESTED:  # with images: the language model's values are nested
        key, model_type = NESTED[values["model_type"]]
        nested: Any = values.get(key)
        require(isinstance(nested, dict), f"{path} must have a {key} for its language model.", describe(nested), fix)
        values = {"model_type": model_type, **nested}
    model_type: Any = values["model_type"]
    require_choice(f"model_type in {path}", model_type, MODEL_TYPES)
    defaults, post_norm = MODEL_TYPES[model_type]
    values = {**defaults, **values}
    activation: Any = values.get("hidden_activation") or values.get("hidden_act")
    require_choice(f"hidden_activation, or else hidden_act, in {path}", activation, NAMES)
    if (model_type, activation) == ("gemma", "gelu"):
        activation = "gelu_pytorch_tanh"
    try:
        config = MLPConfig(
            values["hidden_size"],
            values["intermediate_size"],
            activation=NAMES[activation],
            norm_eps=values["rms_norm_eps"],
            post_norm=post_norm,
        )
        return Model(config, positive_int("num_hidden_layers", values["num_hidden_layers"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
