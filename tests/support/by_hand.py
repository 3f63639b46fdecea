"""Trees of each library, written by hand from arrays of ours."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import gemma_mlp
from gemma_mlp import MLPBlockParams, MLPConfig, layouts
from tests.support import samples

D, F, LAYERS = 4, 6, 5
CONFIG = MLPConfig(D, F)
GEMMA1 = MLPConfig(D, F, post_norm=False)
SQUARE = MLPConfig(D, D)


def arrays(config=CONFIG, layers=LAYERS, dtype=ml_dtypes.bfloat16):
    """Layers of NumPy arrays. No two numbers of a layer are equal."""
    rng = np.random.default_rng(0)
    draw = [
        samples.block_arrays(rng, config.embed_dim, config.hidden_dim, False, config.post_norm) for _ in range(layers)
    ]
    return [{name: leaf.astype(dtype) for name, leaf in samples.block_leaves(layer).items()} for layer in draw]


def params(layers, make=jnp.asarray):
    return [
        MLPBlockParams(
            gemma_mlp.RMSNormParams(make(layer["pre_norm"])),
            gemma_mlp.MLPParams(*(make(layer[name]) for name in ("gate_proj", "up_proj", "down_proj"))),
            gemma_mlp.RMSNormParams(make(layer["post_norm"])) if "post_norm" in layer else None,
        )
        for layer in layers
    ]


def gating(layer, transposed):
    gate, up = layer["gate_proj"], layer["up_proj"]
    return np.stack([gate.T, up.T] if transposed else [gate, up])


def stacked(layers, name, axis=0):
    return np.stack([layer[name] for layer in layers], axis)


def plus_one(scale):
    return scale.astype(np.float32) + np.float32(1)


GEMMA2_NORMS = {"pre_feedforward_layernorm": "pre_norm", "post_feedforward_layernorm": "post_norm"}


def huggingface(layers, norms=GEMMA2_NORMS):
    tree = {}
    for i, layer in enumerate(layers):
        tree |= {
            f"model.layers.{i}.mlp.gate_proj.weight": layer["gate_proj"].T,
            f"model.layers.{i}.mlp.up_proj.weight": layer["up_proj"].T,
            f"model.layers.{i}.mlp.down_proj.weight": layer["down_proj"].T,
        }
        tree |= {f"model.layers.{i}.{theirs}.weight": layer[ours] for theirs, ours in norms.items()}
    return tree


def huggingface_gemma1(layers):
    return huggingface(layers, {"post_attention_layernorm": "pre_norm"})


def deepmind(layers, transposed):
    return {
        f"layer_{i}": {
            "mlp": {"gating_einsum": gating(layer, transposed), "linear": layer["down_proj"]},
            "pre_ffw_norm": {"scale": layer["pre_norm"]},
            "post_ffw_norm": {"scale": layer["post_norm"]},
        }
        for i, layer in enumerate(layers)
    }


def deepmind_flat(layers, transposed):
    tree = {}
    for i, layer in enumerate(layers):
        tree |= {
            f"transformer/layer_{i}/mlp/gating_einsum": {"w": gating(layer, transposed)},
            f"transformer/layer_{i}/mlp/linear": {"w": layer["down_proj"]},
            f"transformer/layer_{i}/pre_ffw_norm": {"scale": layer["pre_norm"]},
            f"transformer/layer_{i}/post_ffw_norm": {"scale": layer["post_norm"]},
        }
    return tree


def deepmind_stacked(layers, transposed):
    tree = {}
    for kind in (0, 1):
        of_kind = layers[kind::2]
        path = f"transformer/stacked_layers/attention_type_{kind}"
        tree |= {
            f"{path}/mlp/gating_einsum": {"w": np.stack([gating(layer, transposed) for layer in of_kind])},
            f"{path}/mlp/linear": {"w": stacked(of_kind, "down_proj")},
            f"{path}/pre_ffw_norm": {"scale": stacked(of_kind, "pre_norm")},
            f"{path}/post_ffw_norm": {"scale": stacked(of_kind, "post_norm")},
        }
    return tree


def maxtext(layers):
    """Layers are stacked on axis 1 of every tensor."""
    layer = {
        "mlp": {
            "wi_0": {"kernel": stacked(layers, "gate_proj", 1)},
            "wi_1": {"kernel": stacked(layers, "up_proj", 1)},
            "wo": {"kernel": stacked(layers, "down_proj", 1)},
        },
        "pre_ffw_norm": {"scale": plus_one(stacked(layers, "pre_norm", 1))},
        "post_ffw_norm": {"scale": plus_one(stacked(layers, "post_norm", 1))},
    }
    return {"decoder": {"layers": layer}}


def maxtext_pairs(layers):
    """Gemma 2 in MaxText: layers with local and global attention alternate."""
    tree = {}
    for ending, of_kind in (("_local", layers[0::2]), ("_global", layers[1::2])):
        for name, subtree in maxtext(of_kind)["decoder"]["layers"].items():
            tree[name + ending] = subtree
    return {"decoder": {"layers": tree}}


def maxtext_fused_unscanned(layers):
    return {
        "decoder": {
            f"layers_{i}": {
                "mlp": {
                    "wi": {"kernel": np.stack([layer["gate_proj"], layer["up_proj"]], axis=1)},  # (D, 2, F)
                    "wo": {"kernel": layer["down_proj"]},
                },
                "pre_ffw_norm": {"scale": plus_one(layer["pre_norm"])},
                "post_ffw_norm": {"scale": plus_one(layer["post_norm"])},
            }
            for i, layer in enumerate(layers)
        }
    }


def t5x(layers):
    return {
        "decoder": {
            f"layers_{i}": {
                "mlp": {
                    "wi_0": {"kernel": layer["gate_proj"]},
                    "wi_1": {"kernel": layer["up_proj"]},
                    "wo": {"kernel": layer["down_proj"]},
                },
                "pre_mlp_layer_norm": {"scale": plus_one(layer["pre_norm"])},
            }
            for i, layer in enumerate(layers)
        }
    }


def flax_nnx(layers):
    return {
        "layers": {
            i: {
                "mlp": {name: {"kernel": layer[name]} for name in ("gate_proj", "up_proj", "down_proj")},
                "pre_ffw_norm": {"scale": layer["pre_norm"]},
                "post_ffw_norm": {"scale": layer["post_norm"]},
            }
            for i, layer in enumerate(layers)
        }
    }


def ours(layers):
    return {
        f"layers_{i}": {
            "mlp": {name: layer[name] for name in ("gate_proj", "up_proj", "down_proj")},
            "pre_norm": {"scale": layer["pre_norm"]},
            "post_norm": {"scale": layer["post_norm"]},
        }
        for i, layer in enumerate(layers)
    }


def ours_stacked(layers):
    return {
        "layers": {
            "mlp": {name: stacked(layers, name) for name in ("gate_proj", "up_proj", "down_proj")},
            "pre_norm": {"scale": stacked(layers, "pre_norm")},
            "post_norm": {"scale": stacked(layers, "post_norm")},
        }
    }


def equal(a, b):
    """Whether two trees have the same bits in the same dtypes."""
    same = jax.tree.map(
        lambda x, y: x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes(),
        a,
        b,
    )
    return all(jax.tree.leaves(same))


TREES = {  # name: (layout, the tree written by hand, config)
    "huggingface": (layouts.huggingface(CONFIG), huggingface, CONFIG),
    "huggingface, Gemma 1": (layouts.huggingface(GEMMA1), huggingface_gemma1, GEMMA1),
    "huggingface, VaultGemma": (
        layouts.huggingface(GEMMA1, pre_norm="pre_feedforward_layernorm"),
        lambda a: huggingface(a, {"pre_feedforward_layernorm": "pre_norm"}),
        GEMMA1,
    ),
    "deepmind": (layouts.deepmind(CONFIG, transpose_gating_einsum=False), lambda a: deepmind(a, False), CONFIG),
    "deepmind, transposed": (
        layouts.deepmind(CONFIG, transpose_gating_einsum=True),
        lambda a: deepmind(a, True),
        CONFIG,
    ),
    "deepmind_flat": (
        layouts.deepmind_flat(CONFIG, transpose_gating_einsum=True),
        lambda a: deepmind_flat(a, True),
        CONFIG,
    ),
    "deepmind_stacked": (
        layouts.deepmind_stacked(CONFIG, attention_types=2, transpose_gating_einsum=False),
        lambda a: deepmind_stacked(a, False),
        CONFIG,
    ),
    "maxtext": (layouts.maxtext(CONFIG), maxtext, CONFIG),
    "maxtext, pairs": (layouts.maxtext(CONFIG, groups=("_local", "_global")), maxtext_pairs, CONFIG),
    "maxtext, fused": (layouts.maxtext(CONFIG, fused=True, scanned=False), maxtext_fused_unscanned, CONFIG),
    "t5x": (layouts.t5x(GEMMA1), t5x, GEMMA1),
    "tunix": (layouts.tunix(CONFIG), flax_nnx, CONFIG),
    "gemma_mlp": (layouts.gemma_mlp(CONFIG), ours, CONFIG),
    "gemma_mlp, stacked": (layouts.gemma_mlp(CONFIG, stacked=True), ours_stacked, CONFIG),
}


def layer_dicts(layers, name):
    """What reading a tree of this library must give. Norms that it stores as 1 + w come as w in float32."""
    wide = {"pre_norm", "post_norm"} if name.startswith(("maxtext", "t5x")) else set()
    return [
        {leaf: array.astype(np.float32) if leaf in wide else array for leaf, array in layer.items()} for layer in layers
    ]
