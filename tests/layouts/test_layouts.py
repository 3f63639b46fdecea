"""Conversions of trees are compared with trees of each library that are written by hand."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import gemma_mlp
from gemma_mlp import MLPConfig, layouts
from gemma_mlp.layouts.libraries import WITHOUT_POST_NORM
from gemma_mlp.params import WEIGHTS
from tests.support import by_hand as by_hand_module
from tests.support.by_hand import (
    CONFIG,
    GEMMA1,
    LAYERS,
    SQUARE,
    TREES,
    D,
    F,
    arrays,
    deepmind,
    deepmind_flat,
    deepmind_stacked,
    equal,
    flax_nnx,
    huggingface,
    huggingface_gemma1,
    layer_dicts,
    maxtext,
    params,
)
from tests.support.vary import slow_except

MAKERS = {"numpy": np.asarray, "jax": jnp.asarray}
CASES = slow_except(
    [*((name, "numpy") for name in TREES), ("huggingface", "jax"), ("deepmind_stacked", "jax"), ("maxtext", "jax")],
    itertools.product(TREES, MAKERS),
)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_from_a_tree(case):
    name, array = case
    (layout, by_hand, config), make = TREES[name], MAKERS[array]
    layers = arrays(config)
    got = layouts.from_tree(jax.tree.map(make, by_hand(layers)), layout)
    assert len(got) == LAYERS
    assert equal(got, params(layer_dicts(layers, name)))
    assert all(isinstance(leaf, np.ndarray if make is np.asarray else jax.Array) for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_to_a_tree(case):
    name, array = case
    layout, by_hand, config = TREES[name]
    layers = arrays(config)
    assert equal(layouts.to_tree(params(layers, MAKERS[array]), layout), by_hand(layers))


@pytest.mark.parametrize("name", TREES)
def test_shapes_convert_as_arrays_do(name):
    layout, by_hand, config = TREES[name]
    structs = jax.eval_shape(lambda: by_hand(arrays(config)) and jax.tree.map(jnp.asarray, by_hand(arrays(config))))
    got = layouts.from_tree(structs, layout)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)  # noqa: E731
    assert shapes(got) == shapes(params(layer_dicts(arrays(config), name)))
    assert shapes(layouts.to_tree(got, layout)) == shapes(by_hand(arrays(config)))


@pytest.mark.parametrize("name", TREES)
def test_names_tell_the_layout(name):
    layout, by_hand, config = TREES[name]
    tree = by_hand(arrays(config)) | {"embedder": {"input_embedding": np.zeros((3, D))}}
    deeper = tree if name.startswith("huggingface") else {"params": tree}
    found = layouts.detect(layouts.flatten(deeper), config)
    assert equal(layouts.from_tree(tree, layout), layouts.from_tree(deeper, found))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", [deepmind, deepmind_flat, deepmind_stacked], ids=lambda form: form.__name__)
def test_the_orientation_is_read_from_the_shape(form, transposed):
    options = {"attention_types": 2} if form is deepmind_stacked else {}
    layout = getattr(layouts, form.__name__)(CONFIG, **options)
    assert equal(layouts.from_tree(form(arrays(), transposed), layout), params(arrays()))


@pytest.mark.parametrize("transposed", [False, True])
def test_where_the_shape_says_nothing_the_orientation_is_asked_for(transposed):
    layers = arrays(SQUARE)
    tree = deepmind(layers, transposed)
    with pytest.raises(
        ValueError, match=r"layer_0/mlp/gating_einsum must decide its orientation.*2DF or 2FD.*choose the orientation"
    ):
        layouts.from_tree(tree, layouts.deepmind(SQUARE))
    layout = layouts.deepmind(SQUARE, transpose_gating_einsum=transposed)
    assert equal(layouts.from_tree(tree, layout), params(layers))


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (2, 2), (1, 2)])
def test_sizes_of_two_confuse_nothing_that_the_layout_says(sizes):
    """With D = 2 or F = 2 and two layers, many axes have length 2."""
    config = MLPConfig(*sizes)
    layers = arrays(config, layers=2)
    for layout, by_hand, kind in TREES.values():
        if kind.post_norm:
            layout = dataclasses.replace(layout, config=config)
            tree = by_hand(layers)
            assert equal(layouts.to_tree(layouts.from_tree(tree, layout), layout), tree)


def reordered(tree, rng):
    """`tree` with the entries of all its dictionaries in another order."""
    if not isinstance(tree, dict):
        return tree
    return {key: reordered(tree[key], rng) for key in [list(tree)[i] for i in rng.permutation(len(tree))]}


SIZES, SEEDS = st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 2**32 - 1)


@given(
    st.sampled_from(sorted(TREES)), SIZES, st.integers(2, 7), st.sampled_from([ml_dtypes.bfloat16, np.float32]), SEEDS
)
def test_any_sizes_and_orders_equal_trees_written_by_hand(name, sizes, num_layers, dtype, seed):
    layout, by_hand, kind = TREES[name]
    config = dataclasses.replace(kind, embed_dim=sizes[0], hidden_dim=sizes[1])
    layout = dataclasses.replace(layout, config=config)
    layers = arrays(config, num_layers, dtype)
    tree = layouts.to_tree(params(layers, np.asarray), layout)
    assert equal(tree, by_hand(layers))
    got = layouts.from_tree(reordered(tree, np.random.default_rng(seed)), layout)
    assert equal(got, params(layer_dicts(layers, name), np.asarray))


GROUPS = st.sampled_from([("",), ("_local", "_global"), ("_0", "_1", "_2", "_3", "_4", "_5")])
OPTIONS = {  # of the layouts in LAYOUTS: those without a default, and others that change where numbers go
    "deepmind": {"transpose_gating_einsum": st.booleans()},
    "deepmind_flat": {"transpose_gating_einsum": st.booleans()},
    "deepmind_stacked": {"transpose_gating_einsum": st.booleans(), "attention_types": st.integers(1, 6)},
    "maxtext": {"groups": GROUPS},
    "maxtext_fused": {"groups": GROUPS},
    "maxtext_unscanned": {"groups": GROUPS},
    "maxtext_unscanned_fused": {"groups": GROUPS},
}


@given(st.data(), st.sampled_from(sorted(layouts.LAYOUTS)), SIZES, st.sampled_from(["4", "8"]), SEEDS)
def test_any_bits_come_back_from_every_layout(data, name, sizes, bytes_each, seed):
    """Of weights all bits do, NaNs' too. Norms are of numbers that also come back from 1 + w."""
    config = MLPConfig(*sizes, post_norm=name not in WITHOUT_POST_NORM)
    options = data.draw(st.fixed_dictionaries(OPTIONS.get(name, {})))
    groups = options.get("attention_types", len(options.get("groups", "1")))
    num_layers = data.draw(st.integers(groups, 12) if "stacked" in name else st.sampled_from([groups, 2 * groups]))
    layout = layouts.LAYOUTS[name](config, prefix=data.draw(st.sampled_from(["", "a/b/"])), **options)
    rng = np.random.default_rng(seed)
    layers = arrays(config, num_layers, f"f{bytes_each}")
    for layer in layers:
        for leaf in WEIGHTS:
            layer[leaf] = np.frombuffer(rng.bytes(layer[leaf].nbytes), f"f{bytes_each}").reshape(layer[leaf].shape)
    tree = layouts.to_tree(params(layers, np.asarray), layout)
    assert equal(layouts.from_tree(reordered(tree, rng), layout), params(layers, np.asarray))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == sum(a.size for layer in layers for a in layer.values())


def test_an_orientation_that_was_not_chosen_cannot_be_written():
    with pytest.raises(ValueError, match=r"orientation of mlp/gating_einsum must be chosen.*2DF and 2FD.*choose one"):
        layouts.to_tree(params(arrays()), layouts.deepmind(CONFIG))


def test_stacks():
    layers = params(arrays())
    stack = layouts.stack(layers)
    assert stack.mlp.down_proj.shape == (LAYERS, F, D)
    assert equal(jax.tree.map(lambda leaf: leaf[3], stack), layers[3])
    assert equal(layouts.unstack(stack), layers)


def test_our_modules_are_trees_of_ours():
    """Linen and NNX models with blocks called layers_0 and layers_1 hold trees of this layout."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = gemma_mlp.linen.MLPBlock(CONFIG, name=f"layers_{i}")(x)
            return x

    variables = Model().init(jax.random.key(0), jnp.ones(D))
    tree = nn.unbox(variables)["params"]
    got = layouts.from_tree(tree, layouts.gemma_mlp(CONFIG))
    assert equal(layouts.to_tree(got, layouts.gemma_mlp(CONFIG)), tree)
    block = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0))
    nnx.update(block, tree["layers_1"])
    got = layouts.from_tree({"layers_0": nnx.to_pure_dict(nnx.state(block, nnx.Param))}, layouts.gemma_mlp(CONFIG))
    assert equal(layouts.to_tree(got, layouts.gemma_mlp(CONFIG))["layers_0"], tree["layers_1"])


# 1 + w


def test_every_bfloat16_w_that_float32_can_hold_as_1_plus_w_survives():
    bits = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    w = bits[np.isfinite(bits.astype(np.float32))]
    factor = (1 + w.astype(np.float64)).astype(np.float32)
    kept = (factor.astype(np.float64) - 1).astype(np.float32) == w.astype(np.float32)
    w, lost = w[kept], w[~kept]
    assert {0.0, -0.5, 0.0078125, 2.0**-16, 300.0} <= set(w.tolist())
    assert {1e-9, 2.0**-25} & set(lost.astype(np.float64).tolist())
    config = dataclasses.replace(CONFIG, embed_dim=len(w), hidden_dim=1)
    layer = {
        "pre_norm": w,
        "post_norm": w,
        "gate_proj": np.zeros((len(w), 1), w.dtype),
        "up_proj": np.zeros((len(w), 1), w.dtype),
        "down_proj": np.zeros((1, len(w)), w.dtype),
    }
    layout = layouts.maxtext(config)
    (back,) = layouts.from_tree(layouts.to_tree(params([layer], np.asarray), layout), layout)
    assert (back.pre_norm.scale == w.astype(np.float32)).all()
    for number in lost[:: len(lost) // 50]:
        bad = layer | {"pre_norm": np.where(np.arange(len(w)) == 0, number, w)}
        with pytest.raises(ValueError, match=r"pre_ffw_norm/scale stores 1 \+ w, and w must come back from it exactly"):
            layouts.to_tree(params([bad], np.asarray), layout)


def test_a_norm_that_would_be_rounded_is_refused_or_rounded_on_request():
    layers = arrays(layers=1, dtype=np.float32)
    layers[0]["post_norm"] = np.float32([0.1, 1e-9, 3.3, -0.7])
    with pytest.raises(ValueError, match=r"post_ffw_norm/scale.*of 4 numbers.*round_norms=True"):
        layouts.to_tree(params(layers), layouts.maxtext(CONFIG))
    tree = layouts.to_tree(params(layers), layouts.maxtext(CONFIG, round_norms=True))
    scale = tree["decoder"]["layers"]["post_ffw_norm"]["scale"]
    assert (np.asarray(scale)[:, 0] == np.float32(1) + layers[0]["post_norm"]).all()


def test_a_stored_factor_that_w_cannot_hold_is_refused():
    tree = maxtext(arrays(layers=1))
    tree["decoder"]["layers"]["pre_ffw_norm"]["scale"] = np.full((D, 1), 1e-9, np.float32)
    with pytest.raises(ValueError, match=r"pre_ffw_norm/scale.*4 of 4 numbers that float32 rounds"):
        layouts.from_tree(tree, layouts.maxtext(CONFIG))
    (rounded,) = layouts.from_tree(tree, layouts.maxtext(CONFIG, round_norms=True))
    assert (rounded.pre_norm.scale == -1).all()


def test_norms_of_bfloat16_factors_are_exact_around_1():
    """s - 1 in bfloat16 would lose bits of s = 0.1; in float32 it does not."""
    tree = maxtext(arrays(layers=1))
    factors = np.array([0.1, 1.0, 1.3, 77.0], ml_dtypes.bfloat16)
    tree["decoder"]["layers"]["pre_ffw_norm"]["scale"] = factors[:, None]
    (got,) = layouts.from_tree(tree, layouts.maxtext(CONFIG))
    assert got.pre_norm.scale.dtype == np.float32
    assert (got.pre_norm.scale.astype(np.float64) == factors.astype(np.float64) - 1).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("name", TREES)
def test_norms_that_multiply_by_w_keep_their_bits_in_every_layout(monkeypatch, name, dtype):
    """Where a layout stores the factor, the factor is w."""
    layout, by_hand, config = TREES[name]
    layout = dataclasses.replace(layout, config=dataclasses.replace(config, scale_plus_one=False))
    layers = arrays(config, dtype=dtype)
    layers = [{leaf: (array / 3).astype(dtype) for leaf, array in layer.items()} for layer in layers]
    tree = layouts.to_tree(params(layers, np.asarray), layout)
    with monkeypatch.context() as patch:
        patch.setattr(by_hand_module, "plus_one", lambda scale: scale)
        assert equal(tree, by_hand(layers))
    assert equal(layouts.from_tree(tree, layout), params(layers, np.asarray))


# Errors


def change(tree, path, value):
    node = tree
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree


NNX_GATE = ("layers", 1, "mlp", "gate_proj", "kernel")
ERRORS = {
    "missing": (NNX_GATE, None, r"layers/1/mlp/gate_proj/kernel in the tree must be \[4, 6\].*\w+: no such tensor"),
    "transposed": (NNX_GATE, np.zeros((F, D), "float32"), r"must be \[4, 6\] of .*\w+: float32\[6, 4\]"),
    "an axis more": (NNX_GATE, np.zeros((1, D, F), "float32"), r"\w+: float32\[1, 4, 6\]"),
    "float16": (NNX_GATE, np.zeros((D, F), "float16"), r"of bfloat16, float32, float64. \w+: float16\[4, 6\]"),
    "integers": (NNX_GATE, np.zeros((D, F), "int8"), r"\w+: int8\[4, 6\]"),
    "not an array": (NNX_GATE, "gate", r"must be \[4, 6\].*\w+: str"),
    "a bias": (
        (*NNX_GATE[:-1], "bias"),
        np.zeros(F, "float32"),
        r"Modules must hold only.*layers/1/mlp/gate_proj/bias",
    ),
    "an adapter": (("layers", 0, "mlp", "lora_a"), np.zeros((D, 2), "float32"), r"\w+: layers/0/mlp/lora_a"),
    "a gap": (("layers", 2), None, r"layers/2/mlp/gate_proj/kernel.*no such tensor"),
    "one config's layers": (("layers", 0, "post_ffw_norm"), None, r"layers/0/post_ffw_norm/scale.*no such tensor"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_tree_that_is_not_right_is_refused(name):
    path, value, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        layouts.from_tree(change(flax_nnx(arrays()), path, value), layouts.tunix(CONFIG))


@pytest.mark.parametrize("name", TREES)
def test_every_module_of_the_block_holds_only_its_own_tensors(name):
    layout, by_hand, config = TREES[name]
    tensors = layouts.flatten(by_hand(arrays(config)), layout.separator)
    for own in tensors:
        other = layout.separator.join([*own.split(layout.separator)[:-1], "other"])
        with pytest.raises(ValueError, match=rf"Modules must hold only.*{re.escape(other)}"):
            layouts.from_tree(tensors | {other: np.zeros(3, "float32")}, layout)


def test_an_empty_tree_names_what_was_looked_for():
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight in the tree.*no such tensor; 0 tensors"
    ):
        layouts.from_tree({}, layouts.huggingface(CONFIG))


def test_gemma_2_is_not_gemma_1():
    with pytest.raises(ValueError, match=r"post_attention_layernorm.*no such tensor"):
        layouts.from_tree(huggingface(arrays()), layouts.huggingface(GEMMA1))
    tree = huggingface(arrays()) | huggingface_gemma1(arrays())  # a whole Gemma 2 has both
    with pytest.raises(ValueError, match=r"\w+: model\.layers\.0\.(pre|post)_feedforward_layernorm\.weight"):
        layouts.from_tree(tree, layouts.huggingface(GEMMA1))
    got = layouts.from_tree(tree, layouts.huggingface(CONFIG))  # here that name belongs to attention
    assert equal(got, params(arrays()))


def test_a_stack_cut_short_is_refused():
    tree = deepmind_stacked(arrays(), False)
    linear = tree["transformer/stacked_layers/attention_type_1/mlp/linear"]
    linear["w"] = linear["w"][:1]
    layout = layouts.deepmind_stacked(CONFIG, attention_types=2)
    with pytest.raises(ValueError, match=r"attention_type_1/mlp/linear/w in the tree must be \[2, 6, 4\].*\[1, 6, 4\]"):
        layouts.from_tree(tree, layout)


def test_two_forms_at_once_are_refused():
    tree = deepmind_flat(arrays(), False) | {"transformer/layer_0": {"mlp/linear": {"w": np.zeros((F, D))}}}
    with pytest.raises(ValueError, match=r"a name of its own\. \w+: transformer/layer_0/mlp/linear/w"):
        layouts.from_tree(tree, layouts.deepmind_flat(CONFIG))


def test_parameters_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"Every layer must have the shapes.*\[4, 6\].*unstack\(\)"):
        layouts.to_tree(params(arrays()), layouts.tunix(dataclasses.replace(CONFIG, hidden_dim=7)))
    with pytest.raises(ValueError, match=r"Every layer must have the shapes"):
        layouts.to_tree([layouts.stack(params(arrays()))], layouts.tunix(CONFIG))
    with pytest.raises(ValueError, match=r"post_norm"):
        layouts.to_tree(params(arrays()), layouts.tunix(GEMMA1))


def test_layouts_without_a_place_for_a_parameter_are_refused():
    with pytest.raises(ValueError, match=r"use_bias must be False.*no biases\. \w+: use_bias=True"):
        layouts.huggingface(MLPConfig(D, F, use_bias=True))
    with pytest.raises(ValueError, match=r"must have a place for pre_norm.*post_norm.*same model family"):
        layouts.t5x(CONFIG)


def test_names_that_tell_no_layout_or_two_are_refused():
    with pytest.raises(ValueError, match=r"none fits; names such as a, b"):
        layouts.detect(["a", "b"], CONFIG)
    names = [f"{prefix}/layer_0/mlp/linear" for prefix in ("teacher", "student")]
    with pytest.raises(ValueError, match=r"fit alike: .*teacher/.*student/"):
        layouts.detect(names, CONFIG)
