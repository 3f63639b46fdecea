"""Folders of adapters as PEFT saves them, written here by hand, and all that is refused in them."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gemma_mlp import LoRAWeight, checkpoint, layouts, quantize
from tests.support import samples
from tests.support.by_hand import SQUARE, D, F, arrays, params

RANK = 2
SIZES = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
SETTINGS = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 3,
    "target_modules": [*SIZES, "q_proj"],
    "bias": "none",
    "use_dora": False,
    "rank_pattern": {},
}
GATE = "base_model.model.model.layers.1.mlp.gate_proj"


def tensors(prefix="model.", layers=(0, 1), ranks=None, dtype="float32"):
    """Theirs are (out, in), and no two numbers are equal."""
    made, rng = {}, np.random.default_rng(0)
    for layer in layers:
        made[f"base_model.model.{prefix}layers.{layer}.self_attn.q_proj.lora_A.weight"] = np.ones((RANK, D), dtype)
        for name, (contracted, output) in SIZES.items():
            rank = (ranks or {}).get((layer, name), RANK)
            module = f"base_model.model.{prefix}layers.{layer}.mlp.{name}"
            made[f"{module}.lora_A.weight"] = samples.normal(rng, (rank, contracted)).astype(dtype)
            made[f"{module}.lora_B.weight"] = samples.normal(rng, (output, rank)).astype(dtype)
    return made


def write(folder, tensors, **settings):
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", ""])
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
def test_every_number_is_read(tmp_path, prefix, dtype):
    stored = tensors(prefix, dtype=dtype)
    adapters = checkpoint.read_adapters(write(tmp_path / "adapter", stored))
    assert list(adapters) == [0, 1] and all(list(of_layer) == sorted(SIZES) for of_layer in adapters.values())
    for layer, of_layer in adapters.items():
        for name, (a, b, factor) in of_layer.items():
            module = f"base_model.model.{prefix}layers.{layer}.mlp.{name}"
            assert a.dtype == b.dtype == dtype
            np.testing.assert_array_equal(a, stored[f"{module}.lora_A.weight"].T)
            np.testing.assert_array_equal(b, stored[f"{module}.lora_B.weight"].T)
            assert factor == 3 / RANK


def test_patterns_and_rslora(tmp_path):
    ranks = {(0, "up_proj"): 5, (1, "up_proj"): 5, (1, "down_proj"): 3}
    folder = write(
        tmp_path / "adapter",
        tensors(ranks=ranks),
        use_rslora=True,
        rank_pattern={"up_proj": 5, r"model\.layers\.1\.mlp\.down_proj": 3, "proj": 9},
        alpha_pattern={"layers.0.mlp.(gate|up)_proj": 8},
    )
    factors = {(n, name): one.factor for n, of in checkpoint.read_adapters(folder).items() for name, one in of.items()}
    assert factors == {
        (0, "gate_proj"): 8 / 2**0.5,
        (0, "up_proj"): 8 / 5**0.5,
        (0, "down_proj"): 3 / 2**0.5,
        (1, "gate_proj"): 3 / 2**0.5,
        (1, "up_proj"): 3 / 5**0.5,
        (1, "down_proj"): 3 / 3**0.5,
    }


@pytest.mark.parametrize("factors", [(1.0, 0.1, 3.5), (7 / 3**0.5, 5 / 3**0.5, 3**0.5)])
def test_what_is_written_is_read_back(tmp_path, factors):
    """Each projection has a rank and a factor of its own, and some have no adapter."""
    rng = np.random.default_rng(0)
    adapters = {
        layer: {
            name: layouts.Adapter(
                *(
                    jnp.asarray(samples.normal(rng, shape), "bfloat16")
                    for shape in ((SIZES[name][0], rank), (rank, SIZES[name][1]))
                ),
                factor,
            )
            for name, rank, factor in zip(SIZES, (3, 3, 3) if factors[0] > 2 else (1, 2, 3), factors)
            if (layer, name) != (3, "up_proj")
        }
        for layer in (0, 3, 11)
    }
    checkpoint.write_adapters(
        tmp_path / "new", adapters, prefix="model.language_model.", base_model="google/gemma-2-2b"
    )
    again = checkpoint.read_adapters(tmp_path / "new")
    assert again.keys() == adapters.keys()
    for layer, of_layer in adapters.items():
        assert again[layer].keys() == of_layer.keys()
        for name, adapter in of_layer.items():
            assert again[layer][name].factor == adapter.factor
            np.testing.assert_array_equal(again[layer][name].lora_a, adapter.lora_a)
            np.testing.assert_array_equal(again[layer][name].lora_b, adapter.lora_b)
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_adapters_go_onto_layers_and_off_again(tmp_path):
    adapters = checkpoint.read_adapters(write(tmp_path / "adapter", tensors(layers=(1,))))
    layers = quantize(params(arrays()), "int8")
    adapted = layouts.insert_adapters(layers, adapters)
    assert adapted[0] is layers[0]
    assert isinstance(adapted[1].mlp.up_proj, LoRAWeight) and adapted[1].mlp.up_proj.base is layers[1].mlp.up_proj
    assert layouts.extract_adapters(adapted) == adapters


def changed(**change):
    return lambda folder: write(folder, tensors(), **change)


def replaced(change):
    def break_(folder):
        made = tensors()
        change(made)
        write(folder, made)

    return break_


def filled(value):
    def change(made):
        made[f"{GATE}.lora_B.weight"][1, 1] = value

    return replaced(change)


def pickled(folder):
    (write(folder, tensors()) / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def add(name, dtype="float32"):
    return replaced(lambda made: made.update({f"base_model.model.model.layers.1.{name}": np.ones((2, 2), dtype)}))


REFUSED = {  # name: (what makes it, the error)
    "DoRA": (changed(use_dora=True), r"plain LoRA\. Got: DoRA \(use_dora True\).*merge_and_unload"),
    "a tensor of DoRA": (add("mlp.gate_proj.lora_magnitude_vector"), "must hold only.*a tensor of DoRA"),
    "another method": (changed(peft_type="IA3"), "must be of LoRA adapters.*'IA3'"),
    "replicated layers": (changed(layer_replication=[[0, 1], [0, 1]]), "several times"),
    "biases": (changed(bias="all"), "without trained biases.*'all'"),
    "a whole weight": (add("mlp.gate_proj.weight"), r"must hold only.*mlp\.gate_proj\.weight"),
    "a trained norm": (add("pre_feedforward_layernorm.weight"), "must hold only.*pre_feedforward_layernorm"),
    "another rank": (changed(r=3), r"down_proj has rank 3. So lora_A must be \[3, in\].*float32\[2, 6\]"),
    "another rank by pattern": (changed(rank_pattern={"1.mlp.gate_proj": 4}), "layers.1.mlp.gate_proj has rank 4"),
    "a pattern that is no pattern": (changed(rank_pattern={"(": 4}), "rank_pattern.*regular expressions.*unterminated"),
    "no rank": (changed(r=None), "must be a whole number"),
    "rank 0": (changed(r=0), "must be a whole number of at least 1"),
    "a factor that is not finite": (changed(lora_alpha=float("inf")), "lora_alpha of .* must be a finite number"),
    "a module that is not named": (changed(target_modules=["gate_proj", "up_proj"]), "down_proj is not named"),
    "a module named by a pattern": (changed(target_modules=".*gate_proj"), "down_proj is not named"),
    "a layer that is not named": (changed(layers_to_transform=[0]), r"layers\.1\.mlp\.down_proj is not named"),
    "an excluded module": (changed(exclude_modules=["up_proj"]), "up_proj is not named, and there are tensors"),
    "a module without tensors": (
        replaced(lambda made: [made.pop(name) for name in list(made) if name.startswith(f"{GATE}.")]),
        r"layers\.1\.mlp\.gate_proj is named, and there are no tensors",
    ),
    "one matrix": (replaced(lambda made: made.pop(f"{GATE}.lora_A.weight")), "must have both matrices.*no lora_A"),
    "a NaN": (filled(np.nan), rf"{GATE}\.lora_B\.weight in .* must be finite.*1 numbers"),
    "an infinity": (filled(np.inf), "must be finite"),
    "integers": (
        replaced(lambda made: made.update({f"{GATE}.lora_A.weight": np.ones((RANK, D), "int32")})),
        r"must be a matrix.*I32\[2, 4\]",
    ),
    "a vector": (
        replaced(lambda made: made.update({f"{GATE}.lora_A.weight": np.ones(D, "float32")})),
        "must be a matrix",
    ),
    "float16": (lambda folder: write(folder, tensors(dtype="float16")), "F16.*dtype="),
    "no MLP": (
        replaced(lambda made: [made.pop(name) for name in list(made) if ".mlp." in name]),
        "must hold adapters of one model's",
    ),
    "two models": (
        lambda folder: write(folder, tensors("model.encoder.") | tensors("model.decoder.")),
        r"model\.decoder\., model\.encoder\..*part=",
    ),
    "a pickle": (pickled, "must hold adapter_model.safetensors.*pickles"),
    "no config": (lambda folder: (write(folder, tensors()) / "adapter_config.json").unlink(), "must be a JSON file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    make, error = REFUSED[name]
    make(tmp_path / "adapter")
    with pytest.raises(ValueError, match=error):
        checkpoint.read_adapters(tmp_path / "adapter")


def test_float16_is_cast_and_a_part_is_chosen(tmp_path):
    folder = write(
        tmp_path / "adapter", tensors("encoder.", dtype="float16") | tensors("decoder.", (0,), dtype="float16")
    )
    adapters = checkpoint.read_adapters(folder, part="decoder", dtype="float32")
    assert list(adapters) == [0] and adapters[0]["gate_proj"].lora_a.dtype == "float32"


def test_adapters_that_do_not_fit_the_layers(tmp_path):
    adapters = checkpoint.read_adapters(write(tmp_path / "adapter", tensors()))
    with pytest.raises(
        ValueError, match=r"gate_proj of layer 0's adapter must be lora_a \[4, rank\] and lora_b \[rank, 4"
    ):
        layouts.insert_adapters(params(arrays(SQUARE)), {0: {"gate_proj": adapters[0]["gate_proj"]}})
    with pytest.raises(ValueError, match=r"some of the layers 0 to 0\. Got: an adapter for layer 1"):
        layouts.insert_adapters(params(arrays(layers=1)), adapters)
    with pytest.raises(ValueError, match="some of gate_proj, up_proj, down_proj"):
        layouts.insert_adapters(params(arrays()), {0: {"q_proj": adapters[0]["gate_proj"]}})
    adapted = layouts.insert_adapters(params(arrays()), adapters)
    with pytest.raises(ValueError, match="one adapter"):
        layouts.insert_adapters(adapted, adapters)
    with pytest.raises(ValueError, match="must have adapters"):
        layouts.extract_adapters(params(arrays()))


def test_what_is_not_written(tmp_path):
    adapter = layouts.Adapter(jnp.ones((D, RANK)), jnp.ones((RANK, F)))
    with pytest.raises(ValueError, match="must be adapters"):
        checkpoint.write_adapters(tmp_path / "new", {})
    with pytest.raises(ValueError, match=r"must be for one of gate_proj, up_proj, down_proj.*for q_proj of layer 0"):
        checkpoint.write_adapters(tmp_path / "new", {0: {"q_proj": adapter}})
    with pytest.raises(ValueError, match=r"lora_a float32\[2, 4\]"):
        checkpoint.write_adapters(tmp_path / "new", {0: {"up_proj": adapter._replace(lora_a=jnp.ones((RANK, D)))}})
    with pytest.raises(ValueError, match="must be finite"):
        checkpoint.write_adapters(
            tmp_path / "new", {0: {"up_proj": adapter._replace(lora_a=jnp.full((D, RANK), jnp.nan))}}
        )
    assert not list(tmp_path.iterdir())
