"""The block's parameters out of checkpoints and back into them: Hugging Face folders, and Orbax in any layout.

Only safetensors and Orbax; no pickle is ever opened. Needs the `checkpoint` extra.
"""

from gemma_mlp.checkpoint.huggingface import (
    Model,
    huggingface_shapes,
    read_config,
    read_huggingface,
    update_huggingface,
    write_huggingface,
)
from gemma_mlp.checkpoint.orbax import orbax_shapes, read_orbax, write_orbax

__all__ = [
    "Model",
    "huggingface_shapes",
    "orbax_shapes",
    "read_config",
    "read_huggingface",
    "read_orbax",
    "update_huggingface",
    "write_huggingface",
    "write_orbax",
]
