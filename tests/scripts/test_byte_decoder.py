"""The optimizer, the score and the sampler of byte models, on models so simple that the result is known by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from byte_decoder import data, evaluation, language_model, training
from byte_decoder.language_model import LanguageModel
from byte_decoder.placement import ONE_DEVICE, Placement, make_mesh
from train_toy import sampling

from tests.scripts.toy import config
from tests.support.vary import vary

# Optax relies on promotion.
pytestmark = [pytest.mark.promotes, pytest.mark.usefixtures("quick_to_compile")]
SEQ_LEN = 4
# Logits of the next byte, from the last byte alone: a table [256, 256].
BIGRAMS = LanguageModel(init=lambda key: {}, logits=lambda table, tokens: table[tokens])


def test_matrices_decay_and_norms_and_the_embedding_do_not():
    """Without gradients Adam changes nothing, so what changes has decayed: by the rate times the decay, at each step.

    The tree is that of both shells.
    """
    shapes = jax.eval_shape(language_model.make("nnx", config("unused", "").mlp, 2, 2).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    optimizer = training.make_optimizer(0.25, steps=4, warmup_fraction=0.5, weight_decay=0.5)
    state, zeros, changed = optimizer.init(params), jax.tree.map(np.zeros_like, params), params
    for _ in range(3):  # at the rates 0, 0.125 and 0.25
        updates, state = jax.jit(optimizer.update)(zeros, state, changed)
        changed = optax.apply_updates(changed, updates)
    decayed, kept = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(changed):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        (kept if "norm" in name or "embed" in name else decayed)[name] = leaf
    assert any("gate_proj" in name for name in decayed) and len(decayed) >= 2 * 4  # attention and MLP of two layers
    assert any("embed" in name for name in kept) and len(kept) >= 1 + 2 * 2
    for name, leaf in decayed.items():
        np.testing.assert_allclose(leaf, (1 - 0.0625) * (1 - 0.125), rtol=1e-6, err_msg=name)
    for name, leaf in kept.items():
        np.testing.assert_array_equal(leaf, 1, err_msg=name)


@vary("count mesh", itertools.product([64, 65, 1, 63, 130], ["", "data=2,fsdp=4,tensor=1"]))
def test_the_score_counts_every_byte_of_every_batch(count, mesh, eight_devices):
    """`count` windows are scored in batches of 64, the last of which may be partial."""
    rng = np.random.default_rng(0)
    text, table = rng.integers(0, 256, 400).astype(np.uint8), rng.standard_normal((256, 256))
    heldout = 2 * count - 1  # a window scores two bytes, and the last one here scores one
    corpus = data.Corpus(train=text[:-heldout], heldout=text[-heldout:])
    assert len(data.evaluation_windows(corpus, SEQ_LEN)[0]) == count
    chances = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    expected = -np.log2(chances[text[-heldout - 1 : -1], text[-heldout:]]).mean()
    placement = Placement(make_mesh(mesh)) if mesh else ONE_DEVICE
    score = evaluation.make_evaluation(BIGRAMS, corpus, SEQ_LEN, placement)
    assert score(jnp.asarray(table, "float32")) == pytest.approx(expected, rel=1e-5)


def test_a_sample_follows_the_last_byte_and_sees_the_last_window():
    """The model is sure of the next byte: the sum of the first and the last byte that it sees."""

    def logits(_, tokens):
        return 1e4 * jax.nn.one_hot((tokens[:, :1] + tokens) % 256, 256)

    seen = context = [3, 141, 59, 26]
    for _ in range(12):
        seen = [*seen, (seen[-len(context)] + seen[-1]) % 256]
    model = LanguageModel(init=lambda key: {}, logits=logits)
    drawn = sampling.continue_text(model, {}, np.array(context, np.uint8), 12, jax.random.key(0))
    assert list(drawn) == seen[len(context) :]


@pytest.mark.slow
def test_a_sample_has_the_chances_of_its_temperature():
    """Two bytes differ by 1 in their logits, so by 1 / 0.8 at that temperature."""
    table = np.full(256, -1e9, np.float32)
    table[[65, 66]] = 0, 1
    model = LanguageModel(init=lambda key: {}, logits=lambda _, tokens: jnp.broadcast_to(table, (*tokens.shape, 256)))
    drawn = sampling.continue_text(model, {}, np.array([65], np.uint8), 4000, jax.random.key(0))
    assert drawn.count(b"A") + drawn.count(b"B") == len(drawn)
    assert drawn.count(b"B") / len(drawn) == pytest.approx(1 / (1 + np.exp(-1 / 0.8)), abs=0.027)  # four deviations
