"""Where each library stores this block's parameters: a table for each, and conversions of trees in both directions."""

from gemma_mlp.layouts.adapters import (
    Adapter,
    Adapters,
    adapters_from_deepmind,
    adapters_to_deepmind,
    extract_adapters,
    insert_adapters,
)
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

__all__ = ["LAYOUTS", "Adapter", "Adapters", "Layout", "Stored", "detect"]
__all__ += ["deepmind", "deepmind_flat", "deepmind_stacked", "gemma_mlp", "huggingface", "maxtext", "t5x", "tunix"]
__all__ += ["flatten", "from_tree", "make_params", "stack", "to_tree", "unstack"]
__all__ += ["adapters_from_deepmind", "adapters_to_deepmind", "extract_adapters", "insert_adapters"]
