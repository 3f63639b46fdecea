"""The feed-forward block of the Gemma models (GeGLU) for JAX and Flax."""

from gemma_mlp import aot, checks, layouts, linen, nnx, sharding
from gemma_mlp.activations import ACTIVATIONS
from gemma_mlp.block import mlp_block, rms_norm
from gemma_mlp.config import PRESETS, MLPConfig
from gemma_mlp.op.api import feed_forward, hidden_activations, mlp, mlp_hidden
from gemma_mlp.params import MLPBlockParams, MLPParams, RMSNormParams

__all__ = [
    "ACTIVATIONS",
    "PRESETS",
    "MLPBlockParams",
    "MLPConfig",
    "MLPParams",
    "RMSNormParams",
    "aot",
    "checks",
    "feed_forward",
    "hidden_activations",
    "layouts",
    "linen",
    "mlp",
    "mlp_block",
    "mlp_hidden",
    "nnx",
    "rms_norm",
    "sharding",
]
