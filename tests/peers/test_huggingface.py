"""The MLP, the norm and the block equal those of Hugging Face's Gemma 2 on PyTorch, in float32."""

import contextlib
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with contextlib.suppress(ModuleNotFoundError):  # then tests/conftest.py leaves these tests out
    import torch
    import transformers
    from transformers.models.gemma2 import modeling_gemma2

from gemma_mlp import MLPConfig, MLPParams, mlp, mlp_block, rms_norm
from gemma_mlp.params import MLPBlockParams, RMSNormParams
from gemma_mlp.testing.oracle import relative_error
from tests.support import samples

pytestmark = pytest.mark.needs_peers

EMBED_DIM, HIDDEN_DIM = 64, 256
CONFIG = MLPConfig(EMBED_DIM, HIDDEN_DIM)
BOUND = 1e-5


def case():
    rng = np.random.default_rng(0)
    return (
        samples.block_arrays(rng, EMBED_DIM, HIDDEN_DIM, use_bias=False),
        samples.normal(rng, (2, 5, EMBED_DIM)),
        samples.normal(rng, (2, 5, EMBED_DIM)),
    )


def hf_config():
    return transformers.Gemma2Config(
        vocab_size=32,
        hidden_size=EMBED_DIM,
        intermediate_size=HIDDEN_DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        attn_implementation="eager",
    )


def load(linear, array):
    """Copies a weight. Ours are (in, out), those of torch are (out, in)."""
    linear.weight.data = torch.tensor(array.T, dtype=torch.float32)


def load_mlp(module, arrays):
    for name in ("gate_proj", "up_proj", "down_proj"):
        load(getattr(module, name), arrays[name])


def compare(ours, theirs, params, x, dy, theirs_by_name):
    """Compares the value, and the gradients of the input and of every parameter."""
    torch_x = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    expected = theirs(torch_x)
    expected.backward(torch.tensor(dy, dtype=torch.float32))
    y, dparams, dx = samples.value_and_pullback(ours, params, jnp.float32(x), dy)
    assert relative_error(y, expected.detach().double().numpy()) <= BOUND
    assert relative_error(dx, torch_x.grad.double().numpy()) <= BOUND
    for gradient, parameter in theirs_by_name(dparams):
        assert relative_error(gradient, parameter.grad.double().numpy()) <= BOUND


def projections(dparams, module):
    return [(getattr(dparams, name).T, getattr(module, name).weight) for name in ("gate_proj", "up_proj", "down_proj")]


def test_the_mlp_equals_the_peers():
    arrays, x, dy = case()
    theirs = modeling_gemma2.Gemma2MLP(hf_config())
    load_mlp(theirs, arrays["mlp"])
    params: MLPParams = samples.mlp_params(arrays["mlp"], "float32")
    compare(lambda p, x: mlp(p, x, CONFIG), theirs, params, x, dy, lambda d: projections(d, theirs))


@pytest.mark.parametrize(("model", "plus_one"), [("Gemma2", True), ("Gemma3n", False), ("Gemma4", False)])
def test_the_norm_equals_the_peers(model, plus_one):
    arrays, x, dy = case()
    modeling = importlib.import_module(f"transformers.models.{model.lower()}.modeling_{model.lower()}")
    theirs = getattr(modeling, f"{model}RMSNorm")(EMBED_DIM, eps=1e-6)
    new = RMSNormParams.init(dataclasses.replace(CONFIG, scale_plus_one=plus_one), jax.random.key(0))
    np.testing.assert_array_equal(new.scale, theirs.weight.detach().numpy())
    theirs.weight.data = torch.tensor(arrays["pre_norm"], dtype=torch.float32)
    scale = RMSNormParams(jnp.float32(arrays["pre_norm"]))

    def ours(p, x):
        return rms_norm(p.scale, x, scale_plus_one=plus_one)

    compare(ours, theirs, scale, x, dy, lambda d: [(d.scale, theirs.weight)])


def test_the_block_equals_the_mlp_half_of_the_peers_decoder_layer():
    """Their layer runs with an attention that returns zeros, so that only the MLP half acts on x."""
    arrays, x, dy = case()
    layer = modeling_gemma2.Gemma2DecoderLayer(hf_config(), layer_idx=0)
    load_mlp(layer.mlp, arrays["mlp"])
    for name, scale in (("pre", arrays["pre_norm"]), ("post", arrays["post_norm"])):
        getattr(layer, f"{name}_feedforward_layernorm").weight.data = torch.tensor(scale, dtype=torch.float32)

    class NoAttention(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return torch.zeros_like(hidden_states), None

    layer.self_attn = NoAttention()

    def theirs(x):
        output = layer(x, position_embeddings=(x, x), position_ids=torch.arange(5)[None])
        return output[0] if isinstance(output, tuple) else output

    def by_name(d: MLPBlockParams):
        assert d.post_norm is not None
        norms = [
            (d.pre_norm.scale, layer.pre_feedforward_layernorm.weight),
            (d.post_norm.scale, layer.post_feedforward_layernorm.weight),
        ]
        return norms + projections(d.mlp, layer.mlp)

    compare(lambda p, x: mlp_block(p, x, CONFIG), theirs, samples.block_params(arrays, "float32"), x, dy, by_name)
