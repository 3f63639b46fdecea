"""Where each library keeps this block's parameters: one table for each, and the conversion of trees."""

from gemma_mlp.layouts.libraries import (
    LAYOUTS,
    deepmind,
    deepmind_flat,
    deepmind_stacked,
    detect,
    gemma_mlp,
    huggingface,
    maxtext,
    t5x,
    tunix,
)
from gemma_mlp.layouts.trees import Layout, from_tree, stack, to_tree, unstack

__all__ = [
    "LAYOUTS",
    "Layout",
    "deepmind",
    "deepmind_flat",
    "deepmind_stacked",
    "detect",
    "from_tree",
    "gemma_mlp",
    "huggingface",
    "maxtext",
    "stack",
    "t5x",
    "to_tree",
    "tunix",
    "unstack",
]
