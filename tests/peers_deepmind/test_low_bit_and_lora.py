"""Trees of DeepMind's `gm.nn.IntWrapper` and `gm.nn.LoRA`: our MLP computes what their FeedForward does with them."""

import contextlib
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with warnings.catch_warnings(), contextlib.suppress(ModuleNotFoundError):  # tests/conftest.py then leaves these out
    warnings.simplefilter("ignore")
    from gemma import gm, peft
    from gemma.gm.nn import _modules

from gemma_mlp import MLPConfig, MLPParams, QuantizedWeight, checkpoint, dequantize, layouts, mlp
from gemma_mlp.layouts import Adapter
from gemma_mlp.testing.oracle import relative_error
from tests.support import by_hand

pytestmark = [pytest.mark.needs_deepmind, pytest.mark.promotes, pytest.mark.filterwarnings("ignore")]

D, F, LAYERS, RANK = 32, 48, 2, 3
CONFIG = MLPConfig(D, F)
BOUND = 1e-6
X = jax.random.normal(jax.random.key(1), (2, 5, D))


def feed_forward(transpose):
    return _modules.FeedForward(features=D, hidden_dim=F, transpose_gating_einsum=transpose)


def plain_tree(transpose):
    return jax.tree.map(jnp.asarray, by_hand.deepmind(by_hand.arrays(CONFIG, LAYERS, "float32"), transpose))


def drawn(tree, key=0):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return treedef.unflatten([0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])


def quantised_tree(transpose, dtype, heads=4):
    """Their function quantises (2, F, D). For (2, D, F) it has no rule, so their module says the shapes."""
    tree = plain_tree(transpose)
    if transpose:
        tree["layer_0"]["attn"] = {"q_einsum": {"w": jnp.zeros((heads, D, 16))}}  # from which it takes D
        return dict(peft.quantize(tree, method=dtype.upper()))
    model = gm.nn.IntWrapper(model=feed_forward(False), dtype=jnp.dtype(dtype))
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    for number, layer in enumerate(tree.values()):
        rng = np.random.default_rng(number)

        def draw(leaf, rng=rng):
            if leaf.dtype == dtype:
                return jnp.asarray(rng.integers(-8, 8, leaf.shape), dtype)
            return jnp.asarray(rng.uniform(5, 20, leaf.shape), leaf.dtype)

        layer["mlp"] = jax.tree.map(draw, shapes)
    return tree


@pytest.mark.parametrize("transpose", [False, True], ids=["(2, D, F)", "(2, F, D)"])
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_int_wrapper(tmp_path, transpose, dtype):
    tree = quantised_tree(transpose, dtype)
    gm.ckpts.save_params(tree, tmp_path / "c", wait_until_finished=True)
    layers = checkpoint.read_orbax(tmp_path / "c", CONFIG)
    assert len(layers) == LAYERS
    jax.tree.map(np.testing.assert_array_equal, layers, layouts.from_tree(tree, layouts.deepmind(CONFIG)))
    theirs = gm.nn.IntWrapper(model=feed_forward(transpose), dtype=jnp.dtype(dtype))
    for number, layer in enumerate(layers):
        stored = tree[f"layer_{number}"]["mlp"]
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(layer.mlp, name)
            assert isinstance(weight, QuantizedWeight) and weight.qvalue.dtype == dtype and weight.dtype == "float32"
        kernel, scale = (stored["_IntEinsum_gating_einsum"][name] for name in ("kernel", "scale"))
        expected = np.asarray(kernel, "float64") / np.asarray(scale, "float64")
        ours = np.stack([getattr(dequantize(layer.mlp), name) for name in ("gate_proj", "up_proj")])
        ours = ours.transpose(0, 2, 1) if transpose else ours
        assert (abs(ours - expected) <= 2**-23 * abs(expected)).all()  # the reciprocal and the result are rounded
        y = theirs.apply({"params": stored}, X)
        assert relative_error(mlp(layer.mlp, X, CONFIG), np.asarray(y, np.float64)) <= BOUND
        assert relative_error(mlp(layer.mlp, X, CONFIG), np.asarray(theirs.apply({"params": stored}, 2 * X))) > 0.1


def test_scales_that_are_powers_of_two_are_exact():
    tree = quantised_tree(True, "int8")
    gating = tree["layer_0"]["mlp"]["_IntEinsum_gating_einsum"]
    gating["scale"] = 2.0 ** jax.random.randint(jax.random.key(0), gating["scale"].shape, -9, 9)
    gate = layouts.from_tree(tree, layouts.deepmind(CONFIG))[0].mlp.gate_proj
    expected = np.asarray(gating["kernel"], "float64") / np.asarray(gating["scale"], "float64")
    np.testing.assert_array_equal(np.asarray(dequantize_weight(gate), "float64"), expected[0].T)


def test_scales_along_the_contracted_axis_are_refused():
    """Their function takes a gating_einsum for the attention's output if there are two heads."""
    tree = quantised_tree(True, "int8", heads=2)
    assert tree["layer_0"]["mlp"]["_IntEinsum_gating_einsum"]["scale"].shape == (1, 1, D)
    with pytest.raises(ValueError, match=r"gating_einsum's scale must be \[groups, out\].*scale float32\[32, 1\]"):
        layouts.from_tree(tree, layouts.deepmind(CONFIG))


def dequantize_weight(weight):
    return dequantize(MLPParams(weight, weight, weight)).gate_proj


@pytest.fixture(scope="module", params=[False, True], ids=["(2, D, F)", "(2, F, D)"])
def lora(request):
    """(their FeedForward with adapters, its parameters, ours with the adapters of the tree)"""
    tree = plain_tree(request.param)
    model = gm.nn.LoRA(rank=RANK, model=feed_forward(request.param), dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    adapters = peft.split_params(shapes).lora
    adapters = {f"layer_{i}": {"mlp": drawn(adapters, i)} for i in range(LAYERS)}
    layers = layouts.from_tree(tree, layouts.deepmind(CONFIG))
    return model, tree, adapters, layouts.insert_adapters(layers, layouts.adapters_from_deepmind(adapters))


def require_same(model, tree, adapters, layers):
    for i, layer in enumerate(layers):
        params = peft.merge_params(tree[f"layer_{i}"]["mlp"], adapters[f"layer_{i}"]["mlp"])
        expected = np.asarray(model.apply({"params": params}, X), np.float64)
        assert relative_error(mlp(layer.mlp, X, CONFIG), expected) <= BOUND
        assert relative_error(model.model.apply({"params": tree[f"layer_{i}"]["mlp"]}, X), expected) > 1e-3


def test_lora_in_and_out(tmp_path, lora):
    model, tree, adapters, layers = lora
    require_same(model, tree, adapters, layers)
    back = layouts.adapters_to_deepmind(layouts.extract_adapters(layers))
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    checkpoint.write_orbax_adapters(tmp_path / "ours", layouts.extract_adapters(layers))
    jax.tree.map(np.testing.assert_array_equal, gm.ckpts.load_params(tmp_path / "ours"), adapters)
    merged = {
        name: peft.merge_params(tree[name], adapters[name]) | {"attn": {"lora": {"a": jnp.ones((2, 2))}}}
        for name in tree
    }
    gm.ckpts.save_params(merged, tmp_path / "theirs", wait_until_finished=True)
    read = checkpoint.read_orbax_adapters(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, read, layouts.extract_adapters(layers))


def test_other_adapters_are_written_wider(lora):
    """Gate and up with a lora_a each, factors, several ranks, and a projection without an adapter."""
    model, tree, _, layers = lora
    adapters = layouts.extract_adapters(layers)
    for number, of_layer in adapters.items():
        ranks = {"gate_proj": 2, "up_proj": 3, "down_proj": 1}
        for i, (name, rank) in enumerate(ranks.items()):
            a, b, _ = of_layer[name]
            a, b = (0.3 * jax.random.normal(jax.random.key(10 * number + i), matrix.shape) for matrix in (a, b))
            of_layer[name] = Adapter(a[:, :rank], b[:rank], 0.5**i)
    del adapters[1]["up_proj"]
    with pytest.raises(ValueError, match=r"share lora_a.*widen"):
        layouts.adapters_to_deepmind({0: adapters[0]})
    wide = layouts.adapters_to_deepmind(adapters, widen=True)
    assert wide["layer_0"]["mlp"]["_LoRAEinsum_gating_einsum"]["lora"]["b"].shape == (5, 2, F)
    bare = [dataclasses.replace(layer, mlp=MLPParams(*(w.base for w in mlp_weights(layer)))) for layer in layers]
    wider = gm.nn.LoRA(rank=5, model=model.model, dtype=jnp.float32)
    require_same(wider, tree, wide, layouts.insert_adapters(bare, adapters))


def mlp_weights(layer):
    return [getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
