"""A decoder of Flax NNX modules, named and nested as in Flax's Gemma example: its checkpoint, and our MLP inside it."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import gemma_mlp
from gemma_mlp import MLPConfig, checkpoint, layouts, mlp_block
from gemma_mlp.testing.oracle import relative_error

pytestmark = [pytest.mark.usefixtures("quick_to_compile"), pytest.mark.promotes]  # Flax and Orbax rely on it

D, F, LAYERS, VOCABULARY = 32, 48, 3, 50
CONFIG = MLPConfig(D, F)
BOUND = 1e-5
TOKENS = jnp.arange(12)[None] % VOCABULARY


class RMSNorm(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(0.3 * jax.random.normal(rngs.params(), (D,)))

    def __call__(self, x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + self.scale[...])


class FeedForward(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.pre_attention_norm = RMSNorm(rngs)
        self.attn = nnx.MultiHeadAttention(2, D, use_bias=False, decode=False, rngs=rngs)
        self.post_attn_norm = RMSNorm(rngs)
        self.pre_ffw_norm = RMSNorm(rngs)
        self.mlp = FeedForward(rngs)
        self.post_ffw_norm = RMSNorm(rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:-1]))
        return self.second_half(x + self.post_attn_norm(self.attn(self.pre_attention_norm(x), mask=mask)))

    def second_half(self, x):
        return x + self.post_ffw_norm(self.mlp(self.pre_ffw_norm(x)))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embedder = nnx.Embed(VOCABULARY, D, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.final_norm = RMSNorm(rngs)

    def __call__(self, tokens):
        x = self.embedder(tokens) * jnp.sqrt(D)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.attend(self.final_norm(x))


def test_blocks_out_of_its_checkpoint_compute_what_its_modules_do(tmp_path):
    model = Transformer(nnx.Rngs(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", nnx.to_pure_dict(nnx.state(model)))
    layers = checkpoint.read_orbax(tmp_path / "c", CONFIG)
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    assert len(layers) == LAYERS
    for params, layer in zip(layers, model.layers):
        assert relative_error(mlp_block(params, x, CONFIG), np.asarray(layer.second_half(x), np.float64)) <= BOUND


def test_what_we_write_updates_its_model(tmp_path):
    source, target = Transformer(nnx.Rngs(0)), Transformer(nnx.Rngs(1))
    layers = layouts.from_tree(nnx.to_pure_dict(nnx.state(source, nnx.Param)), layouts.tunix(CONFIG))
    nnx.update(target, layouts.to_tree(layers, layouts.tunix(CONFIG)))
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    for ours, theirs in zip(target.layers, source.layers):
        assert (ours.second_half(x) == theirs.second_half(x)).all()
        assert (ours.pre_attention_norm.scale[...] != theirs.pre_attention_norm.scale[...]).all()


@pytest.mark.slow
def test_it_runs_with_our_mlp_in_place_of_its_feed_forward():
    theirs, ours = Transformer(nnx.Rngs(0)), Transformer(nnx.Rngs(0))
    layers = layouts.from_tree(nnx.to_pure_dict(nnx.state(theirs, nnx.Param)), layouts.tunix(CONFIG))
    for layer, params in zip(ours.layers, layers):
        layer.mlp = gemma_mlp.nnx.MLP(CONFIG, rngs=nnx.Rngs(7))
        nnx.update(layer.mlp, {name: getattr(params.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")})
    weights = jax.random.normal(jax.random.key(2), (1, 12, VOCABULARY))
    assert relative_error(ours(TOKENS), np.asarray(theirs(TOKENS), np.float64)) <= BOUND
    gradients = [nnx.grad(lambda model: (model(TOKENS) * weights).sum())(model) for model in (ours, theirs)]
    got, expected = (dict(flat(gradient)) for gradient in gradients)
    assert len(got) == len(expected) == 2 + LAYERS * (4 + 4 + 3)
    for name, leaf in expected.items():
        assert relative_error(got[name], np.asarray(leaf, np.float64)) <= BOUND, name


def flat(gradient):
    """Yields (name, leaf). Linear's `kernel` is left out of the names, so that ours and theirs are the same."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(gradient))[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/").replace("_proj/kernel", "_proj"), leaf
