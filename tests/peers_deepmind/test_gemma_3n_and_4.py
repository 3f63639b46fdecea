"""Our blocks equal the MLP halves of DeepMind's Gemma 3n and dense Gemma 4, out of their checkpoints, in float32."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

with warnings.catch_warnings(), contextlib.suppress(ModuleNotFoundError):  # tests/conftest.py then leaves these out
    warnings.simplefilter("ignore")
    from gemma import gm
    from gemma.gm.nn.gemma3n import _config as config3n
    from gemma.gm.nn.gemma3n import _layers as layers3n
    from gemma.gm.nn.gemma3n import _modules as modules3n
    from gemma.gm.nn.gemma3n import _transformer as transformer3n
    from gemma.gm.nn.gemma4 import _config as config4
    from gemma.gm.nn.gemma4 import _layers as layers4
    from gemma.gm.nn.gemma4 import _modules as modules4
    from gemma.gm.nn.gemma4 import _transformer as transformer4

from gemma_mlp import MLPConfig, checkpoint, layouts, mlp_block
from gemma_mlp.layouts.trees import block_leaves
from gemma_mlp.testing.oracle import relative_error

pytestmark = [pytest.mark.needs_deepmind, pytest.mark.promotes, pytest.mark.filterwarnings("ignore")]

D, F, LAYERS = 32, 48, 4
CONFIG = MLPConfig(D, F, scale_plus_one=False)
BOUND = 1e-5
TOKENS = jnp.arange(12)[None] % 64
SIZES = {
    "num_embed": 64,
    "embed_dim": D,
    "hidden_dim": F,
    "num_heads": 2,
    "head_dim": 16,
    "num_kv_heads": 1,
    "final_logit_softcap": 30.0,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "sliding_window_size": 8,
    "per_layer_input_dim": 8,
}


def gemma3n():
    pattern = (modules3n.AttentionType.LOCAL_SLIDING, modules3n.AttentionType.GLOBAL) * (LAYERS // 2)
    own = {"transpose_gating_einsum": True, "scale_plus_one": False, "use_altup": True, "altup_coef_clip": 120.0}
    own |= {"use_laurel": True, "laurel_rank": 4, "use_qk_norm": True, "use_value_norm": True}
    config = config3n.TransformerConfig(**SIZES, **own, attention_types=pattern)
    norm = layers3n.RMSNorm(scale_plus_one=False)
    mlp = modules3n.FeedForward(features=D, hidden_dim=F, transpose_gating_einsum=True)
    return transformer3n.Gemma3nTransformer(config=config, dtype=jnp.float32), norm, mlp


def gemma4():
    pattern = (modules4.AttentionType.LOCAL_SLIDING, modules4.AttentionType.GLOBAL) * (LAYERS // 2)
    rope = {"global_rope_proportion": 0.25, "local_rope_proportion": 1.0}
    config = config4.TransformerConfig(**SIZES, **rope, attention_types=pattern, global_key_size=16)
    mlp = modules4.FeedForward(features=D, hidden_dim=F)
    return transformer4.Transformer(config=config, dtype=jnp.float32), layers4.RMSNorm(), mlp


def draw(tree):
    """Draws every leaf at random."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten([0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])


@pytest.fixture(scope="module", params=[gemma3n, gemma4])
def peer(request):
    """(their model, its parameters, their norm, their MLP)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, norm, mlp = request.param()
        params = draw(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"])
    assert params["layer_0"]["mlp"]["gating_einsum"].shape == (2, F, D)
    return model, params, norm, mlp


def test_blocks_out_of_their_checkpoint_compute_what_their_modules_do(tmp_path, peer):
    """Values, and gradients of the input and of every parameter."""
    _, params, norm, mlp = peer
    gm.ckpts.save_params(params, tmp_path / "c", wait_until_finished=True)
    x, dy = (jax.random.normal(jax.random.key(i), (2, 5, D)) for i in (1, 2))

    def theirs(layer, x):
        y = mlp.apply({"params": layer["mlp"]}, norm.apply({"params": layer["pre_ffw_norm"]}, x))
        return x + norm.apply({"params": layer["post_ffw_norm"]}, y)

    layers = checkpoint.read_orbax(tmp_path / "c", CONFIG)
    assert len(layers) == LAYERS
    for i, ours in enumerate(layers):
        half = {name: params[f"layer_{i}"][name] for name in ("mlp", "pre_ffw_norm", "post_ffw_norm")}
        expected, their_pullback = jax.vjp(theirs, half, x)
        y, pullback = jax.vjp(lambda p, x: mlp_block(p, x, CONFIG), ours, x)
        (dhalf, their_dx), (dours, dx) = their_pullback(dy), pullback(dy)
        assert relative_error(y, np.asarray(expected, np.float64)) <= BOUND
        assert relative_error(dx, np.asarray(their_dx, np.float64)) <= BOUND
        gradients = block_leaves(layouts.from_tree({"layer_0": dhalf}, layouts.deepmind(CONFIG))[0])
        for name, gradient in block_leaves(dours).items():
            assert relative_error(gradient, np.asarray(gradients[name], np.float64)) <= BOUND, name


def test_written_back_bit_for_bit(tmp_path, peer):
    model, params, _, _ = peer
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", params)
    layers = checkpoint.read_orbax(tmp_path / "theirs", CONFIG)
    tree = layouts.to_tree(layers, layouts.deepmind(CONFIG, transpose_gating_einsum=True))
    merged = params | {name: params[name] | tree[name] for name in tree}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, merged, params))
    logits = lambda params: model.apply({"params": params}, TOKENS).logits  # noqa: E731
    assert (logits(merged) == logits(params)).all()


def test_the_block_comes_before_the_scalar_of_a_gemma_4_layer():
    """With an attention that returns zeros, and without embeddings for each layer."""
    sizes = {"num_heads": 2, "num_kv_heads": 1, "embed_dim": D, "head_dim": 16, "hidden_dim": F}
    norms = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
    layer = modules4.Block(**sizes, **norms, attn_type=modules4.AttentionType.GLOBAL, global_rope_proportion=0.25)
    x, mask = jax.random.normal(jax.random.key(1), (2, 5, D)), jnp.ones((2, 5, 5), bool)
    inputs = (x, jnp.arange(5)[None], None, mask)
    params = draw(jax.eval_shape(layer.init, jax.random.key(0), *inputs)["params"])
    params["attn"]["attn_vec_einsum"] = jax.tree.map(jnp.zeros_like, params["attn"]["attn_vec_einsum"])
    (ours,) = layouts.from_tree({"layer_0": params}, layouts.detect(layouts.flatten({"layer_0": params}), CONFIG))
    _, expected = layer.apply({"params": params}, *inputs)
    y = params["skip_scale"] * mlp_block(ours, x, CONFIG)
    assert relative_error(y, np.asarray(expected, np.float64)) <= BOUND
