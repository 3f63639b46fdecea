"""Reads and writes the block's parameters: Hugging Face folders, and Orbax checkpoints in any layout.

It never opens a pickle. It needs the `checkpoint` extra.
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
