"""Where each library stores this block's parameters: a table for each, and conversions of trees in both directions."""

from gemma_mlp.layouts.layout import Layout, Stored
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
from gemma_mlp.layouts.trees import flatten, from_tree, make_params, stack, to_tree, unstack

__all__ = [
    "LAYOUTS",
    "Layout",
    "Stored",
    "deepmind",
    "deepmind_flat",
    "deepmind_stacked",
    "detect",
    "flatten",
    "from_tree",
    "gemma_mlp",
    "huggingface",
    "make_params",
    "maxtext",
    "stack",
    "t5x",
    "to_tree",
    "tunix",
    "unstack",
]
