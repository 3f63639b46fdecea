"""The layouts of the libraries, one function for each, and `detect`, which tells a layout by its tensors' names.

Of two leaves in one tensor, the first has index 0 of the axis 2 (layout.py, `Stored`). To add a library, follow "How to
add a layout" in this folder's README: some steps lie outside of this file.
"""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable

from gemma_mlp.checks import require
from gemma_mlp.config import MLPConfig
from gemma_mlp.layouts.layout import Layout, Stored
from gemma_mlp.params import LEAVES, WEIGHTS


def huggingface(config: MLPConfig, prefix: str = "model.", *, pre_norm: str | None = None) -> Layout:
    """Hugging Face transformers' Gemma models (`modeling_gemma*.py`). Weights are stored (out, in).

    Gemma 1 calls the norm before the MLP `post_attention_layernorm`. In later models that name belongs to attention,
    and this block's norms are `pre_feedforward_layernorm` and `post_feedforward_layernorm`.

    Args:
      config: the block's sizes.
      prefix: stands before every name.
      pre_norm: the name of the norm before the MLP; None: that of Gemma 1 if the block has no post-norm, else that of
        later models. VaultGemma has the later name and no post-norm.
    """
    pre = pre_norm or ("pre_feedforward_layernorm" if config.post_norm else "post_attention_layernorm")
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
    """DeepMind's `gemma` package, nested as `model.init()` returns it.

    `gating_einsum` holds gate and up: index 0 is gate, index 1 is up. `linear` is down, (F, D).

    Args:
      config: the block's sizes.
      prefix: stands before every name; "params/" in a Kauldron checkpoint.
      transpose_gating_einsum: as in their config. True: gating_einsum is (2, F, D), as in the checkpoints of 9B and
        27B. False: it is (2, D, F), as in those of 2B. None: its shape decides; if D = F, it cannot.
    """
    return _deepmind(config, prefix + "layer_{layer}", transpose_gating_einsum)


def deepmind_flat(
    config: MLPConfig, prefix: str = "transformer/", *, transpose_gating_einsum: bool | None = None
) -> Layout:
    """DeepMind's released checkpoints: :func:`deepmind`, but with one key for each module.

    Such a key is "transformer/layer_0/mlp/linear". The array lies below it, under the key "w" or "scale".
    """
    return _deepmind(config, prefix + "layer_{layer}", transpose_gating_einsum, **FLAT)


def deepmind_stacked(
    config: MLPConfig,
    prefix: str = "transformer/",
    *,
    attention_types: int,
    transpose_gating_einsum: bool | None = None,
) -> Layout:
    """DeepMind's stacked checkpoints: :func:`deepmind_flat` with all layers of one attention type in one tensor.

    `attention_types` is the length of the attention pattern: 1 in Gemma 1, 2 in Gemma 2, 6 in Gemma 3. The other
    arguments are those of :func:`deepmind`.
    """
    groups, layer = tuple(map(str, range(attention_types))), prefix + "stacked_layers/attention_type_{group}"
    return _deepmind(config, layer, transpose_gating_einsum, lead="L", groups=groups, **FLAT)


FLAT = {"weight": "/w", "keys": lambda name: tuple(name.rsplit("/", 1))}  # a key for each module, one for its array


def _deepmind(config, layer, transpose, *, lead="", weight="", **options) -> Layout:
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
        **options,
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
    """MaxText, whose norms store their factor: 1 + w, or w with `scale_plus_one=False`.

    Args:
      config: the block's sizes.
      prefix: stands before every name.
      fused: whether gate and up are one tensor `wi` instead of `wi_0` and `wi_1`. It is (D, L, 2, F) if scanned, else
        (D, 2, F). Index 0 of the axis 2 is gate.
      scanned: whether layers are stacked on axis 1 of every tensor, as MaxText's `param_scan_axis` says.
      groups: endings of the modules' names. Gemma 2 alternates between two kinds of layers: ("_local", "_global").
      round_norms: True: round 1 + w where w cannot be recovered from it. False: refuse.
    """
    lead = "L" if scanned else ""
    return Layout(
        config,
        layer=prefix + ("layers" if scanned else "layers_{entry}"),
        stored=(
            *_wi_wo("mlp{group}/", fused, lead),
            Stored("pre_ffw_norm{group}/scale", ("pre_norm",), (f"D{lead}",), factor=True),
            Stored("post_ffw_norm{group}/scale", ("post_norm",), (f"D{lead}",), factor=True),
        ),
        modules=("mlp{group}", "pre_ffw_norm{group}", "post_ffw_norm{group}"),
        groups=groups,
        round_norms=round_norms,
    )


def t5x(config: MLPConfig, prefix: str = "decoder/", *, round_norms: bool = False) -> Layout:
    """T5X's decoder-only models, whose norms store their factor. They have no post-norm, so they can hold Gemma 1."""
    return Layout(
        config,
        layer=prefix + "layers_{layer}",
        stored=(
            *_wi_wo("mlp/", fused=False, lead=""),
            Stored("pre_mlp_layer_norm/scale", ("pre_norm",), ("D",), factor=True),
        ),
        modules=("mlp", "pre_mlp_layer_norm"),
        round_norms=round_norms,
    )


def _wi_wo(module: str, fused: bool, lead: str) -> tuple[Stored, ...]:
    down = Stored(f"{module}wo/kernel", ("down_proj",), (f"F{lead}D",))
    if fused:
        return Stored(f"{module}wi/kernel", ("gate_proj", "up_proj"), (f"D{lead}2F",)), down
    return (
        Stored(f"{module}wi_0/kernel", ("gate_proj",), (f"D{lead}F",)),
        Stored(f"{module}wi_1/kernel", ("up_proj",), (f"D{lead}F",)),
        down,
    )


def tunix(config: MLPConfig, prefix: str = "") -> Layout:
    """The NNX module tree of Flax's Gemma example and of Tunix: `layers[i].mlp.gate_proj.kernel`, (in, out)."""
    return Layout(
        config,
        layer=prefix + "layers/{layer}",
        stored=(
            *(Stored(f"mlp/{name}/kernel", (name,), (LEAVES[name],)) for name in WEIGHTS),
            Stored("pre_ffw_norm/scale", ("pre_norm",), ("D",)),
            Stored("post_ffw_norm/scale", ("post_norm",), ("D",)),
        ),
        modules=("mlp", "pre_ffw_norm", "post_ffw_norm"),
        keys=lambda name: tuple(int(key) if key.isdecimal() else key for key in name.split("/")),
    )


def gemma_mlp(config: MLPConfig, prefix: str = "", *, stacked: bool = False) -> Layout:
    """This package's own modules: `layers_0/mlp/gate_proj`. If `stacked`, `layers/mlp/gate_proj` holds all layers."""
    lead = "L" if stacked else ""
    return Layout(
        config,
        layer=prefix + ("layers" if stacked else "layers_{layer}"),
        stored=(
            *(Stored(f"mlp/{name}", (name,), (lead + LEAVES[name],)) for name in WEIGHTS),
            Stored("pre_norm/scale", ("pre_norm",), (f"{lead}D",)),
            Stored("post_norm/scale", ("post_norm",), (f"{lead}D",)),
        ),
        modules=("mlp", "pre_norm", "post_norm"),
    )


LAYOUTS: dict[str, Callable[..., Layout]] = {  # `detect` tries all of these; scripts/convert.py takes their names
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
NO_PLUS_ONE = re.compile(r"[/.](layer_scalar|skip_scale|altup|laurel)\b")  # tensors that only Gemma 3n and 4 have
WITHOUT_POST_NORM = {"t5x"}  # these have no place for a post-norm, so they can hold Gemma 1 only


def detect(names: Iterable[str], config: MLPConfig) -> Layout:
    """The layout and prefix that recognise the most tensors of layer 0.

    Only `names` count here, the keys of `flatten(tree)`, with "/" between their parts. :func:`from_tree` then checks
    everything else.

    Raises:
      ValueError: if no layout fits, or several fit equally well; if the names are those of a Gemma 3n or 4, whose norms
        multiply by w, and the config says 1 + w.
    """
    names = list(names)
    types = re.findall(r"stacked_layers/attention_type_(\d+)/", "\n".join(names))
    options = {  # arguments of layouts, as the names tell them
        "attention_types": 1 + max(map(int, types), default=0),
        "groups": ("_local", "_global") if any("/mlp_local/" in name for name in names) else ("",),
        "pre_norm": "pre_feedforward_layernorm" if any(".pre_feedforward_" in name for name in names) else None,
    }
    makers = {}
    found: Counter[tuple[str, str]] = Counter()
    for layout_name, make in LAYOUTS.items():
        if config.post_norm and layout_name in WITHOUT_POST_NORM:
            continue
        taken = options.keys() & inspect.signature(make).parameters
        makers[layout_name] = functools.partial(make, **{key: options[key] for key in taken})
        layout = makers[layout_name](config, "")
        for stored in layout.stored:
            suffix = layout.name(stored, 0)
            prefixes = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
            found.update((layout_name, prefix) for prefix in prefixes if prefix == "" or prefix[-1] in "/.")
    best = [key for key, count in found.items() if count == max(found.values())]
    require(
        len(best) == 1,
        f"The names of the tensors must fit one layout out of {', '.join(LAYOUTS)}.",
        f"{f'these fit alike: {best}' if best else 'none fits'}; names such as {', '.join(names[:3])}",
        "make the layout by its function in gemma_mlp.layouts.",
    )
    layout_name, prefix = best[0]
    marks = [name for name in names if NO_PLUS_ONE.search(name)]
    require(
        not (marks and config.scale_plus_one) or layout_name.startswith("gemma_mlp"),  # which is as the config says
        "The norms of Gemma 3n and 4 multiply by w instead of 1 + w, so their config must have scale_plus_one=False.",
        f"scale_plus_one=True, and tensors such as {', '.join(marks[:1])}",
        "choose a preset of that model, or change the config; or make the layout by its function.",
    )
    return makers[layout_name](config, prefix)
