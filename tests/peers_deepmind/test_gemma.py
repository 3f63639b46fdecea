"""Our blocks equal those of DeepMind's own `gemma` package, read its checkpoints, and run inside it, in float32.

The package installs TensorFlow and much else, so it has an environment of its own. tests/README.md says how to make it.
"""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn

with warnings.catch_warnings(), contextlib.suppress(ModuleNotFoundError):  # tests/conftest.py then leaves these out
    warnings.simplefilter("ignore")
    from gemma import gm
    from gemma.gm.ckpts import _checkpoint as their_checkpoint
    from gemma.gm.nn import _config, _layers, _modules, _transformer

import gemma_mlp
from gemma_mlp import MLPConfig, checkpoint, layouts, mlp, mlp_block
from gemma_mlp.testing.oracle import relative_error

pytestmark = [pytest.mark.needs_deepmind, pytest.mark.promotes, pytest.mark.filterwarnings("ignore")]

D, F, LAYERS = 32, 48, 4
CONFIG = MLPConfig(D, F)
BOUND = 1e-5
TOKENS = jnp.arange(12)[None] % 64


def transformer(transpose):
    """A small Gemma 2, configured as they do it."""
    pattern = (_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL)
    config = _config.TransformerConfig(
        num_embed=64,
        embed_dim=D,
        hidden_dim=F,
        num_heads=2,
        head_dim=16,
        num_kv_heads=1,
        final_logit_softcap=30.0,
        attention_types=pattern * (LAYERS // 2),
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        query_pre_attn_norm=_config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_HEAD_DIM,
        attn_logits_soft_cap=50.0,
        sliding_window_size=8,
        transpose_gating_einsum=transpose,
    )
    return _transformer.Transformer(config=config, dtype=jnp.float32)


def draw(tree):
    """Draws every leaf at random, also the norms."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten([0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])


@pytest.fixture(scope="module", params=[False, True], ids=["(2, D, F)", "(2, F, D)"])
def peer(request):
    """(their model, its parameters, whether gating_einsum is transposed)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformer(request.param)
        params = draw(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"])
    assert params["layer_0"]["mlp"]["gating_einsum"].shape == ((2, F, D) if request.param else (2, D, F))
    return model, params, request.param


def logits(model, params):
    return model.apply({"params": params}, TOKENS).logits


def test_blocks_out_of_their_checkpoint_compute_what_their_modules_do(tmp_path, peer):
    _, params, transpose = peer
    gm.ckpts.save_params(params, tmp_path / "c", wait_until_finished=True)
    layers = checkpoint.read_orbax(tmp_path / "c", CONFIG)
    assert len(layers) == LAYERS
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    their_mlp = _modules.FeedForward(features=D, hidden_dim=F, transpose_gating_einsum=transpose)
    norm = _layers.RMSNorm()
    for i, ours in enumerate(layers):
        layer = params[f"layer_{i}"]
        y = their_mlp.apply({"params": layer["mlp"]}, x)
        assert relative_error(mlp(ours.mlp, x, CONFIG), np.asarray(y, np.float64)) <= BOUND
        y = norm.apply({"params": layer["pre_ffw_norm"]}, x)
        y = norm.apply({"params": layer["post_ffw_norm"]}, their_mlp.apply({"params": layer["mlp"]}, y))
        assert relative_error(mlp_block(ours, x, CONFIG), np.asarray(x + y, np.float64)) <= BOUND


FORMS = {
    "nested": (lambda params: params, layouts.deepmind),
    "flat": (lambda params: their_checkpoint._nested_to_flat(params), layouts.deepmind_flat),
    "stacked": (
        lambda params: their_checkpoint._nested_to_stacked(params, 2),
        lambda config, **options: layouts.deepmind_stacked(config, attention_types=2, **options),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_of_their_forms_is_read_and_written_back_bit_for_bit(tmp_path, peer, form):
    """Their own code makes the form; ours reads it; theirs loads what ours writes, and its logits stay the same."""
    model, params, transpose = peer
    theirs, layout = FORMS[form]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", theirs(params))
    layers = checkpoint.read_orbax(tmp_path / "theirs", CONFIG)
    tree = layouts.to_tree(layers, layout(CONFIG, transpose_gating_einsum=transpose))
    expected = theirs(params)
    merged = jax.tree_util.tree_map_with_path(lambda path, leaf: at(tree, path, leaf), expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, merged, expected))
    gm.ckpts.save_params(merged, tmp_path / "ours", wait_until_finished=True)
    loaded = gm.ckpts.load_params(tmp_path / "ours")  # of stacked forms some leaves are on one device and others on all
    loaded = jax.device_put(loaded, jax.devices()[0])
    assert (logits(model, loaded) == logits(model, params)).all()


def at(tree, path, otherwise):
    """The leaf of `tree` at a path, or `otherwise` if `tree` has none there."""
    for key in path:
        if key.key not in tree:
            return otherwise
        tree = tree[key.key]
    return tree


def test_what_we_write_alone_has_their_names_and_shapes(tmp_path, peer):
    _, params, transpose = peer
    layers = layouts.from_tree(params, layouts.deepmind(CONFIG))
    layout = layouts.deepmind_flat(CONFIG, transpose_gating_einsum=transpose)
    checkpoint.write_orbax(tmp_path / "c", layers, layout)
    loaded = gm.ckpts.load_params(tmp_path / "c")  # flat to nested, by their code
    ours = ("mlp", "pre_ffw_norm", "post_ffw_norm")
    expected = {f"layer_{i}": {name: params[f"layer_{i}"][name] for name in ours} for i in range(LAYERS)}
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, expected))


def test_their_transformer_runs_with_our_mlp(peer, monkeypatch):
    model, params, _ = peer
    weights = jax.random.normal(jax.random.key(2), (1, 12, 64))

    def loss(params):
        output = logits(model, params)
        return (output * weights).sum(), output

    (_, expected), their_gradients = jax.value_and_grad(loss, has_aux=True)(params)

    def ours(features, hidden_dim, transpose_gating_einsum):
        return gemma_mlp.linen.MLP(MLPConfig(features, hidden_dim))

    monkeypatch.setattr(_modules, "FeedForward", ours)
    layout = layouts.deepmind(CONFIG)

    def with_our_mlps(params):
        layers = layouts.from_tree(params, layout)
        swapped = {name: dict(value) for name, value in params.items()}
        for i, layer in enumerate(layers):
            swapped[f"layer_{i}"]["mlp"] = {
                name: getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")
            }
        return swapped

    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS))["params"]
    assert set(shapes["layer_0"]["mlp"]) == {"gate_proj", "up_proj", "down_proj"}  # our MLP runs
    (_, got), gradients = jax.value_and_grad(lambda params: loss(with_our_mlps(params)), has_aux=True)(params)
    assert relative_error(got, np.asarray(expected, np.float64)) <= BOUND
    for ours_, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(their_gradients), strict=True):
        assert relative_error(ours_, np.asarray(theirs, np.float64)) <= BOUND
