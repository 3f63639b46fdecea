"""Adapters in trees of DeepMind's `gm.nn.LoRA`, written here by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import layouts
from gemma_mlp.layouts import Adapter
from tests.support.by_hand import D, F

RANK = 3
SIZES = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}


def draw(*shape, key=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), key), shape)


def tree(prefix="layer_", layers=(0, 2)):
    def of_layer(i):
        gating = {"a": draw(D, RANK, key=4 * i), "b": draw(RANK, 2, F, key=4 * i + 1)}
        linear = {"a": draw(F, RANK, key=4 * i + 2), "b": draw(RANK, D, key=4 * i + 3)}
        return {
            "mlp": {"_LoRAEinsum_gating_einsum": {"lora": gating}, "_LoRAEinsum_linear": {"lora": linear}},
            "attn": {"_LoRAEinsum_0": {"lora": {"a": jnp.ones((D, RANK))}}},
        }

    return {f"{prefix}{i}": of_layer(i) for i in layers}


def test_every_number_goes_in_and_out():
    theirs = tree()
    adapters = layouts.adapters_from_deepmind({"params": theirs})
    assert list(adapters) == [0, 2]
    gating, linear = (theirs["layer_2"]["mlp"][f"_LoRAEinsum_{name}"]["lora"] for name in ("gating_einsum", "linear"))
    for i, name in enumerate(("gate_proj", "up_proj")):
        np.testing.assert_array_equal(adapters[2][name].lora_a, gating["a"])
        np.testing.assert_array_equal(adapters[2][name].lora_b, gating["b"][:, i])
    np.testing.assert_array_equal(adapters[2]["down_proj"].lora_b, linear["b"])
    assert all(adapter.factor == 1 for adapter in adapters[2].values())
    back = layouts.adapters_to_deepmind(adapters)
    expected = {name: {"mlp": layer["mlp"]} for name, layer in theirs.items()}
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, back, expected)


def product(adapter):
    return adapter.factor * np.asarray(adapter.lora_a, "float64") @ np.asarray(adapter.lora_b, "float64")


def ours(ranks, factors=(1.0, 1.0, 1.0), names=SIZES, share=True):
    layer = {}
    for i, name in enumerate(names):
        a = draw(SIZES[name][0], ranks[i], key=0 if share and i < 2 else i)
        layer[name] = Adapter(a, draw(ranks[i], SIZES[name][1], key=10 + i), factors[i])
    return {0: layer}


WIDER = {  # name: (the adapters, the rank that is written, the error without widen)
    "a lora_a each": (ours((3, 3, 6), share=False), 6, "share lora_a"),
    "several ranks": (ours((2, 2, 4)), 4, r"one rank.*ranks \[2, 4\]"),
    "gate and up of other ranks": (ours((1, 2, 3), share=False), 3, "share lora_a"),
    "only gate": (ours((2,), names=("gate_proj",)), 2, "none for up_proj, down_proj in layer 0"),
    "only down": (ours((2,), names=("down_proj",)), 2, "none for gate_proj, up_proj in layer 0"),
}


@pytest.mark.parametrize("name", WIDER)
def test_adapters_that_only_a_wider_tree_holds(name):
    adapters, rank, error = WIDER[name]
    with pytest.raises(ValueError, match=rf"{error}.*widen=True"):
        layouts.adapters_to_deepmind(adapters)
    wide = layouts.adapters_to_deepmind(adapters, widen=True)
    assert wide["layer_0"]["mlp"]["_LoRAEinsum_gating_einsum"]["lora"]["a"].shape == (D, rank)
    again = layouts.adapters_from_deepmind(wide)[0]
    for projection, shape in SIZES.items():
        own = adapters[0].get(projection)
        np.testing.assert_array_equal(product(again[projection]), np.zeros(shape) if own is None else product(own))


def test_a_factor_that_is_a_power_of_two_goes_into_lora_b():
    adapters = ours((3, 3, 3), (4.0, 0.5, 1.0))
    again = layouts.adapters_from_deepmind(layouts.adapters_to_deepmind(adapters))
    for name, adapter in adapters[0].items():
        np.testing.assert_array_equal(product(again[0][name]), product(adapter))


def test_what_is_refused():
    for factor in (0.3, 3.0):
        with pytest.raises(ValueError, match=rf"power of two.*factor {factor} for gate_proj of layer 0"):
            adapters = ours((3, 3, 3), (factor, 1.0, 1.0))
            adapters[0]["gate_proj"] = adapters[0]["gate_proj"]._replace(lora_b=jnp.ones((3, F)))
            layouts.adapters_to_deepmind(adapters)
    with pytest.raises(ValueError, match=r"power of two.*factor 1\.39\d+e\+42"):
        layouts.adapters_to_deepmind(ours((3, 3, 3), (2.0**140, 1.0, 1.0)))
    with pytest.raises(ValueError, match=r"one dtype.*bfloat16, float32"):
        mixed = ours((3, 3, 3))
        mixed[0]["up_proj"] = Adapter(*(m.astype("bfloat16") for m in mixed[0]["up_proj"][:2]))
        layouts.adapters_to_deepmind(mixed)
    with pytest.raises(ValueError, match="must hold adapters of an MLP"):
        layouts.adapters_from_deepmind({"layer_0": {"attn": jnp.ones(1)}})
    with pytest.raises(ValueError, match=r"once.*another opt/layer_0/mlp"):
        layouts.adapters_from_deepmind({"model": tree(), "opt": tree()})
    theirs = tree()
    theirs["layer_0"]["mlp"]["_LoRAEinsum_gating_einsum"]["lora"]["b"] = jnp.ones((RANK, F))
    with pytest.raises(ValueError, match=r"a \[in, rank\] and b \[rank, 2, out\].*layer 0"):
        layouts.adapters_from_deepmind(theirs)
    del theirs["layer_0"]["mlp"]["_LoRAEinsum_gating_einsum"]["lora"]["b"]
    with pytest.raises(ValueError, match=r"a \[in, rank\] and b \[rank, 2, out\]"):
        layouts.adapters_from_deepmind(theirs)
