"""Hugging Face folders of a small Gemma 2, written and read by safetensors alone."""

import contextlib
import json
import os

import numpy as np
import pytest
import safetensors.numpy

from tests.support.by_hand import LAYERS, D, F, huggingface

SETTINGS = {
    "model_type": "gemma2",
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "vocab_size": 11,
}


def others(layers):
    """The tensors of a Gemma 2 that are not our block's."""
    tree = {"model.embed_tokens.weight": np.full((11, D), 3, np.float32), "model.norm.weight": np.ones(D, np.float32)}
    for i in range(layers):
        tree[f"model.layers.{i}.self_attn.q_proj.weight"] = np.full((2 * D, D), i, np.float16)
        tree[f"model.layers.{i}.post_attention_layernorm.weight"] = np.full(D, 7, np.float32)
        tree[f"model.layers.{i}.input_layernorm.weight"] = np.full(D, 8, np.float32)
    return tree


def write(folder, layers, shards=1, settings=SETTINGS):
    """Writes a checkpoint in one file, or with layer i in shard i % shards. Returns its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    tensors = huggingface(layers) | others(len(layers))
    if shards == 1:
        save(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for name in tensors:
        number = int(name.split(".")[2]) % shards if ".layers." in name else 0
        weight_map[name] = f"model-{number + 1:05}-of-{shards:05}.safetensors"
    for file in set(weight_map.values()):
        save(folder / file, {name: array for name, array in tensors.items() if weight_map[name] == file})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save(path, tensors):
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt", "note": "kept"})


def load(folder):
    """Every tensor in the folder, read by safetensors alone."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


class Killed(BaseException):
    """Ends an update as a kill would: nothing of it catches this."""


@contextlib.contextmanager
def killed_after_the_rename():
    """Ends the update inside of it right after the new names are in place."""
    replace = os.replace

    def killed(*paths):
        replace(*paths)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        yield
