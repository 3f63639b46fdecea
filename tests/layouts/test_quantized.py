"""Trees with quantised weights: ours, and DeepMind's, whose scales are reciprocals. Written here by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_mlp import LoRA, MLPConfig, QuantizedWeight, add_lora, layouts
from gemma_mlp.layouts.trees import block_leaves
from tests.support import by_hand

D, F = 8, 12
CONFIG = MLPConfig(D, F)
LAYERS = 3
WEIGHTS = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
rng = np.random.default_rng(0)


def quantised(groups=2, dtype="int8", make=jnp.asarray):
    """Layers of quantised weights. No two scales are equal."""
    layers = by_hand.params(by_hand.arrays(CONFIG, LAYERS, "float32"), make)
    result = []
    for layer in layers:
        weights = {
            name: QuantizedWeight(
                make(rng.integers(-8, 8, shape).astype(dtype)),
                make(rng.uniform(0.5, 2, (groups, shape[1])).astype("float32")),
            )
            for name, shape in WEIGHTS.items()
        }
        result.append(dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, **weights)))
    return result


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", ["int4", "int8", "float8_e4m3fn"])
def test_our_own_trees(stacked, groups, dtype):
    layers = quantised(groups, dtype)
    layout = layouts.gemma_mlp(CONFIG, stacked=stacked)
    tree = layouts.to_tree(layers, layout)
    names = layouts.flatten(tree)
    first = "layers/mlp/up_proj" if stacked else "layers_0/mlp/up_proj"
    assert names[f"{first}/qvalue"].dtype == dtype and names[f"{first}/scale"].dtype == "float32"
    again = layouts.from_tree(tree, layout)
    assert jax.tree.structure(again) == jax.tree.structure(layers)
    jax.tree.map(np.testing.assert_array_equal, again, layers)
    jax.tree.map(np.testing.assert_array_equal, layouts.from_tree(names, layout), layers)  # names as keys
    shapes = layouts.from_tree(jax.eval_shape(lambda: tree), layout)
    assert shapes == jax.eval_shape(lambda: layers)


def deepmind(layers, transposed):
    """kernel / scale in place of qvalue * scale."""
    tree = {}
    for i, layer in enumerate(layers):
        gate, up, down = (getattr(layer.mlp, name) for name in WEIGHTS)
        gating = [jnp.stack([getattr(gate, part), getattr(up, part)]) for part in ("qvalue", "scale")]
        gating = [array.swapaxes(1, 2) for array in gating] if transposed else gating
        tree[f"layer_{i}"] = {
            "mlp": {
                "_IntEinsum_gating_einsum": {"kernel": gating[0], "scale": 1 / gating[1]},
                "_IntEinsum_linear": {"kernel": down.qvalue, "scale": 1 / down.scale},
            },
            "pre_ffw_norm": {"scale": layer.pre_norm.scale},
            "post_ffw_norm": {"scale": layer.post_norm.scale},
        }
    return tree


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepminds_scales_are_reciprocals(transposed, dtype):
    """All scales are powers of two here, whose reciprocals are exact."""
    layers = jax.tree.map(
        lambda leaf: jnp.asarray(2.0 ** jnp.round(leaf), dtype) if leaf.dtype == "float32" else leaf, quantised(1)
    )
    again = layouts.from_tree(deepmind(layers, transposed), layouts.deepmind(CONFIG))
    for ours, expected in zip(again, layers):
        for name, leaf in block_leaves(expected).items():
            jax.tree.map(np.testing.assert_array_equal, block_leaves(ours)[name], leaf)
        assert ours.mlp.up_proj.dtype == "float32"  # in bfloat16 a reciprocal would lose eight bits


def test_one_scale_for_gate_and_up():
    """As DeepMind's module has it for (2, D, F)."""
    layers = quantised(1)
    tree = deepmind(layers, False)
    gating = tree["layer_1"]["mlp"]["_IntEinsum_gating_einsum"]
    gating["scale"] = gating["scale"][:1]
    tree = jax.tree.map(np.asarray, tree)  # JAX would forgive an index that is out of range
    mlp = layouts.from_tree(tree, layouts.deepmind(CONFIG))[1].mlp
    np.testing.assert_array_equal(mlp.up_proj.scale, mlp.gate_proj.scale)
    np.testing.assert_array_equal(mlp.up_proj.qvalue, layers[1].mlp.up_proj.qvalue)


def replace(part, array):
    def change(tree):
        tree["layers_1"]["mlp"]["up_proj"] = dataclasses.replace(tree["layers_1"]["mlp"]["up_proj"], **{part: array})

    return change


def without_scale(tree):
    tree["layers_1"]["mlp"]["up_proj"] = {"qvalue": tree["layers_1"]["mlp"]["up_proj"].qvalue}


REFUSED = {  # name: (the change, the error)
    "no scale": (without_scale, "layers_1/mlp/up_proj in the tree must be .*no such tensor"),
    "too many groups": (replace("scale", jnp.ones((3, F))), r"layers_1/mlp/up_proj's scale must be .*float32\[3, 12\]"),
    "transposed": (replace("scale", jnp.ones((F, 2))), r"scale must be \[groups, out\].*float32\[12, 2\]"),
    "scales of rank 1": (replace("scale", jnp.ones(F)), r"scale of layers_1/mlp/up_proj must have as many axes"),
    "other sizes": (replace("qvalue", jnp.ones((D, D), "int8")), r"up_proj in .* must be \[8, 12\].*\[8, 8\]"),
    "int16": (replace("qvalue", jnp.ones((D, F), "int16")), "qvalue dtype must be one of int8.*'int16'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_trees(name):
    change, error = REFUSED[name]
    tree = layouts.to_tree(quantised(), layouts.gemma_mlp(CONFIG))
    change(tree)
    with pytest.raises(ValueError, match=error):
        layouts.from_tree(tree, layouts.gemma_mlp(CONFIG))


def test_other_layouts_hold_no_quantised_and_no_adapted_weights():
    layers = quantised()
    adapted = add_lora(layers, LoRA(rank=2), jax.random.key(0))
    for name, make in layouts.LAYOUTS.items():
        if name in ("t5x", "deepmind_stacked"):
            continue
        options = {"transpose_gating_einsum": True} if name.startswith("deepmind") else {}
        layout = make(CONFIG, **options)
        with pytest.raises(ValueError, match=r"without an adapter.*extract_adapters"):
            layouts.to_tree(adapted, layout)
        if not name.startswith("gemma_mlp"):
            with pytest.raises(ValueError, match=r"must be a dense weight.*dequantize"):
                layouts.to_tree(layers, layout)
