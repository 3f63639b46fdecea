"""The feed-forward block of the Gemma models (GeGLU) for JAX and Flax."""

from gemma_mlp import aot, checks, layouts, linen, nnx, sharding
from gemma_mlp.activations import ACTIVATIONS
from gemma_mlp.adapters import add_lora, merge_lora, remove_lora
from gemma_mlp.block import mlp_block, rms_norm
from gemma_mlp.config import PRESETS, LoRA, MLPConfig
from gemma_mlp.op.api import feed_forward, hidden_activations, mlp, mlp_hidden
from gemma_mlp.params import MLPBlockParams, MLPParams, RMSNormParams
from gemma_mlp.quantization import dequantize, quantize
from gemma_mlp.weights import LoRAWeight, QuantizedWeight

__all__ = [
    "ACTIVATIONS",
    "PRESETS",
    "LoRA",
    "LoRAWeight",
    "MLPBlockParams",
    "MLPConfig",
    "MLPParams",
    "QuantizedWeight",
    "RMSNormParams",
]
__all__ += ["feed_forward", "hidden_activations", "mlp", "mlp_block", "mlp_hidden", "rms_norm"]
__all__ += ["add_lora", "dequantize", "merge_lora", "quantize", "remove_lora"]
__all__ += ["aot", "checks", "layouts", "linen", "nnx", "sharding"]
