"""Where other libraries keep this block's parameters: one table for each, for :func:`from_tree` and :func:`to_tree`."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from gemma_mlp.checks import require
from gemma_mlp.config import MLPConfig
from gemma_mlp.layouts.trees import LEAVES, Layout, Stored


def huggingface(config: MLPConfig, prefix: str = "model.") -> Layout:
    """Hugging Face transformers' Gemma 1, 2 and 3 (`modeling_gemma*.py`); weights are stored (out, in).

    Gemma 1 calls the norm before the MLP `post_attention_layernorm`; in Gemma 2 and 3 that name belongs to attention,
    and `pre_feedforward_layernorm` and `post_feedforward_layernorm` are this block's.
    """
    pre = "pre_feedforward_layernorm" if config.post_norm else "post_attention_layernorm"
    return Layout(
        config,
        layer=prefix + "layers.{layer}",
        stored=(
            Stored("mlp.gate_proj.weight", ("gate_proj",), ("FD",)),
            Stored("mlp.up_proj.weight", ("up_proj",), ("FD",)),
            Stored("mlp.down_proj.weight", ("down_proj",), ("DF",)),
            Stored(f"{pre}.weight", ("pre_norm",), ("D",)),
            Stored("post_feedforward_layernorm.weight", ("post_norm",), ("D",)),
        ),
        modules=("mlp", pre, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        separator=".",
        keys=lambda name: (name,),
    )


def deepmind(config: MLPConfig, prefix: str = "", *, transpose_gating_einsum: bool | None = None) -> Layout:
    """DeepMind's `gemma` package, as `model.init()` nests it; `prefix` is "params/" in a Kauldron checkpoint.

    Args:
      config: sizes.
      prefix: of the names.
      transpose_gating_einsum: as their config calls it: whether gating_einsum is (2, F, D), as in the checkpoints of
        9B and 27B, or (2, D, F), as in 2B's. None: as the shape says; where D = F it says nothing and this is needed.
    """
    return _deepmind(config, prefix + "layer_{layer}", "", transpose_gating_einsum)


def deepmind_flat(
    config: MLPConfig, prefix: str = "transformer/", *, transpose_gating_einsum: bool | None = None
) -> Layout:
    """DeepMind's released checkpoints: keys like "transformer/layer_0/mlp/linear" over a leaf "w" or "scale"."""
    layout = _deepmind(config, prefix + "layer_{layer}", "/w", transpose_gating_einsum)
    return dataclasses.replace(layout, keys=lambda name: tuple(name.rsplit("/", 1)))


def deepmind_stacked(
    config: MLPConfig,
    prefix: str = "transformer/",
    *,
    attention_types: int,
    transpose_gating_einsum: bool | None = None,
) -> Layout:
    """DeepMind's stacked checkpoints: flat, the layers of one kind of attention together.

    Args:
      config: sizes.
      prefix: of the names.
      attention_types: layers in one turn of the attention pattern: 1 in Gemma 1, 2 in Gemma 2, 6 in Gemma 3.
      transpose_gating_einsum: as for :func:`deepmind`.
    """
    layout = _deepmind(config, prefix + "stacked_layers/attention_type_{group}", "/w", transpose_gating_einsum, "L")
    groups = tuple(str(group) for group in range(attention_types))
    return dataclasses.replace(layout, groups=groups, keys=lambda name: tuple(name.rsplit("/", 1)))


def _deepmind(config: MLPConfig, layer: str, weight: str, transpose: bool | None, lead: str = "") -> Layout:
    gating = {None: ("2DF", "2FD"), False: ("2DF",), True: ("2FD",)}[transpose]
    return Layout(
        config,
        layer=layer,
        stored=(
            Stored(f"mlp/gating_einsum{weight}", ("gate_proj", "up_proj"), tuple(lead + axes for axes in gating)),
            Stored(f"mlp/linear{weight}", ("down_proj",), (f"{lead}FD",)),
            Stored("pre_ffw_norm/scale", ("pre_norm",), (f"{lead}D",)),
            Stored("post_ffw_norm/scale", ("post_norm",), (f"{lead}D",)),
        ),
        modules=("mlp", "pre_ffw_norm", "post_ffw_norm"),
    )


def maxtext(
    config: MLPConfig,
    prefix: str = "decoder/",
    *,
    fused: bool = False,
    scanned: bool = True,
    groups: tuple[str, ...] = ("",),
    round_norms: bool = False,
) -> Layout:
    """MaxText, whose norms store 1 + w.

    Args:
      config: sizes.
      prefix: of the names.
      fused: gate and up in one `wi`, (D, 2, F), in place of `wi_0` and `wi_1`.
      scanned: layers stacked on axis 1 of every tensor, MaxText's own `param_scan_axis`.
      groups: endings of the modules' names; Gemma 2 goes by pairs, ("_local", "_global").
      round_norms: keeps float32(1 + w), which is the factor that the block multiplies by, even where w cannot be had
        back from it exactly.
    """
    lead = "L" if scanned else ""
    return Layout(
        config,
        layer=prefix + ("layers" if scanned else "layers_{entry}"),
        stored=(
            *_wi_wo("mlp{group}/", fused, lead),
            Stored("pre_ffw_norm{group}/scale", ("pre_norm",), (f"D{lead}",), plus_one=True),
            Stored("post_ffw_norm{group}/scale", ("post_norm",), (f"D{lead}",), plus_one=True),
        ),
        modules=("mlp{group}", "pre_ffw_norm{group}", "post_ffw_norm{group}"),
        groups=groups,
        round_norms=round_norms,
    )


def t5x(config: MLPConfig, prefix: str = "decoder/", *, round_norms: bool = False) -> Layout:
    """T5X's decoder-only models (`wi_0`, `wi_1`, `wo`), which have no post-norm; norms store 1 + w."""
    return Layout(
        config,
        layer=prefix + "layers_{layer}",
        stored=(
            *_wi_wo("mlp/", fused=False, lead=""),
            Stored("pre_mlp_layer_norm/scale", ("pre_norm",), ("D",), plus_one=True),
        ),
        modules=("mlp", "pre_mlp_layer_norm"),
        round_norms=round_norms,
    )


def _wi_wo(module: str, fused: bool, lead: str) -> tuple[Stored, ...]:
    down = Stored(f"{module}wo/kernel", ("down_proj",), (f"F{lead}D",))
    if fused:
        return Stored(f"{module}wi/kernel", ("gate_proj", "up_proj"), (f"D{lead}2F",)), down
    gate = Stored(f"{module}wi_0/kernel", ("gate_proj",), (f"D{lead}F",))
    return gate, dataclasses.replace(gate, name=f"{module}wi_1/kernel", leaves=("up_proj",)), down


def tunix(config: MLPConfig, prefix: str = "") -> Layout:
    """The NNX modules of Flax's Gemma example and of Tunix: `layers[i].mlp.gate_proj.kernel`, (in, out)."""
    return Layout(
        config,
        layer=prefix + "layers/{layer}",
        stored=(
            *(Stored(f"mlp/{name}/kernel", (name,), (LEAVES[name],)) for name in ("gate_proj", "up_proj", "down_proj")),
            Stored("pre_ffw_norm/scale", ("pre_norm",), ("D",)),
            Stored("post_ffw_norm/scale", ("post_norm",), ("D",)),
        ),
        modules=("mlp", "pre_ffw_norm", "post_ffw_norm"),
        keys=lambda name: tuple(int(key) if key.isdecimal() else key for key in name.split("/")),
    )


def gemma_mlp(config: MLPConfig, prefix: str = "", *, stacked: bool = False) -> Layout:
    """This package's own modules, `layers_0/mlp/gate_proj`; `stacked`, `layers/mlp/gate_proj` with a leading axis."""
    lead = "L" if stacked else ""
    return Layout(
        config,
        layer=prefix + ("layers" if stacked else "layers_{layer}"),
        stored=(
            *(Stored(f"mlp/{name}", (name,), (lead + LEAVES[name],)) for name in ("gate_proj", "up_proj", "down_proj")),
            Stored("pre_norm/scale", ("pre_norm",), (f"{lead}D",)),
            Stored("post_norm/scale", ("post_norm",), (f"{lead}D",)),
        ),
        modules=("mlp", "pre_norm", "post_norm"),
    )


LAYOUTS: dict[str, Callable[..., Layout]] = {  # by the names that scripts/convert.py takes
    "huggingface": huggingface,
    "deepmind": deepmind,
    "deepmind_flat": deepmind_flat,
    "deepmind_stacked": deepmind_stacked,
    "maxtext": maxtext,
    "maxtext_fused": functools.partial(maxtext, fused=True),
    "maxtext_unscanned": functools.partial(maxtext, scanned=False),
    "maxtext_unscanned_fused": functools.partial(maxtext, scanned=False, fused=True),
    "t5x": t5x,
    "tunix": tunix,
    "gemma_mlp": gemma_mlp,
    "gemma_mlp_stacked": functools.partial(gemma_mlp, stacked=True),
}


def detect(names: Iterable[str], config: MLPConfig) -> Layout:
    """The one layout, with its prefix, that has a name for the most of what layer 0 has among `names`.

    Names alone decide it; :func:`from_tree` then holds all the rest to it.

    Raises:
      ValueError: if none fits, or several do equally well.
    """
    names = list(names)
    groups = {int(match[1]) for name in names if (match := re.search(r"stacked_layers/attention_type_(\d+)/", name))}
    pairs = any("/mlp_local/" in name for name in names)
    options: dict[str, dict[str, Any]] = {"deepmind_stacked": {"attention_types": 1 + max(groups, default=0)}} | {
        name: {"groups": ("_local", "_global")} for name in LAYOUTS if name.startswith("maxtext") and pairs
    }
    found: Counter[tuple[str, str]] = Counter()
    for layout_name, make in LAYOUTS.items():
        if layout_name == "t5x" and config.post_norm:
            continue
        layout = make(config, "", **options.get(layout_name, {}))
        for stored in layout.stored:
            suffix = layout.name(stored, 0)
            found.update((layout_name, name.removesuffix(suffix)) for name in names if _ends(name, suffix))
    best = [key for key, count in found.items() if count == max(found.values())]
    require(
        len(best) == 1,
        f"Names of tensors tell which layout they are of, out of {', '.join(LAYOUTS)}.",
        f"{'none fits' if not best else 'these fit alike: ' + str(best)}; names such as {', '.join(names[:3])}",
        "make the layout by its function in gemma_mlp.layouts.",
    )
    name, prefix = best[0]
    return LAYOUTS[name](config, prefix, **options.get(name, {}))


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or (name.endswith(suffix) and name[-len(suffix) - 1] in "/.")
