"""Converts the block's parameters from one library's checkpoint into another's, and reads the result back.

    python scripts/convert.py --source=HF_FOLDER --target=NEW --to=deepmind_flat --transpose_gating_einsum=true
    python scripts/convert.py --source=ORBAX --preset=gemma2_2b --target=NEW --to=tunix
    python scripts/convert.py --source=ORBAX --embed_dim=64 --hidden_dim=256 --target=HF_FOLDER --to=huggingface

A source with a config.json is a Hugging Face folder; any other is an Orbax checkpoint, whose layout its names tell. A
Hugging Face folder that exists gets its MLP blocks replaced and keeps all else; any other target is new. Both the
source's and the result's parameters are in memory at the end.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from tqdm import tqdm

from gemma_mlp import PRESETS, MLPBlockParams, MLPConfig, checkpoint, layouts
from gemma_mlp.checks import require
from gemma_mlp.dtypes import DTYPES
from gemma_mlp.layouts.trees import Layout, stored_tensors

SOURCE = flags.DEFINE_string("source", None, "A Hugging Face folder or an Orbax checkpoint.", required=True)
TARGET = flags.DEFINE_string("target", None, "Where to write.", required=True)
TO = flags.DEFINE_enum("to", None, list(layouts.LAYOUTS), "The layout to write.", required=True)
PRESET = flags.DEFINE_enum("preset", None, list(PRESETS), "The sizes of an Orbax source.")
EMBED_DIM = flags.DEFINE_integer("embed_dim", None, "D of an Orbax source, in place of --preset.", lower_bound=1)
HIDDEN_DIM = flags.DEFINE_integer("hidden_dim", None, "F of an Orbax source.", lower_bound=1)
POST_NORM = flags.DEFINE_boolean("post_norm", True, "Whether an Orbax source has a norm after the MLP (not Gemma 1).")
TRANSPOSE = flags.DEFINE_boolean("transpose_gating_einsum", None, "For deepmind*: (2, F, D), or (2, D, F).")
FROM = flags.DEFINE_enum("from", None, list(layouts.LAYOUTS), "The layout of an Orbax source; else its names tell.")
SOURCE_TRANSPOSE = flags.DEFINE_boolean("source_transpose_gating_einsum", None, "With --from=deepmind*, where D = F.")
ATTENTION_TYPES = flags.DEFINE_integer("attention_types", 2, "For deepmind_stacked: layers in a turn of the pattern.")
ROUND_NORMS = flags.DEFINE_boolean("round_norms", False, "For maxtext* and t5x: round a 1 + w that loses bits of w.")
DTYPE = flags.DEFINE_enum("dtype", None, list(DTYPES), "Cast to this; by default nothing is rounded.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Check names, shapes and dtypes, print the table, write nothing.")


def main(argv):
    logging.set_verbosity(logging.WARNING)  # JAX and Orbax tell of much at INFO
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    try:
        convert(Path(SOURCE.value), Path(TARGET.value))
    except ValueError as error:
        raise SystemExit(str(error)) from error


def convert(source: Path, target: Path) -> None:
    config = source_config(source)
    layout = make_layout(TO.value, config, TRANSPOSE.value)
    source_layout = make_layout(FROM.value, config, SOURCE_TRANSPOSE.value) if FROM.value else None
    orbax_shapes = functools.partial(checkpoint.orbax_shapes, layout=source_layout)
    shapes = call(source, config, checkpoint.huggingface_shapes, orbax_shapes)
    if DTYPE.value:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, DTYPE.value), shapes)
    print_table(shapes, layout)
    in_place = TO.value == "huggingface" and target.exists()
    require(in_place or not target.exists(), "The target is new.", f"{target}, which exists", "choose another.")
    if DRY_RUN.value:
        if in_place:
            checkpoint.huggingface_shapes(target)
        print("Dry run: nothing is written.")
        return
    params = read(source, config, source_layout, "reading")
    if in_place:
        checkpoint.update_huggingface(target, params)
    elif TO.value == "huggingface":
        checkpoint.write_huggingface(target, params, config)
    else:
        checkpoint.write_orbax(target, params, layout)
    require_same(params, read(target, config, layout, "verifying"))
    print(f"{target}: {len(params)} layers, read back and the same, bit for bit.")


def source_config(source: Path) -> MLPConfig:
    if (source / "config.json").exists():
        return checkpoint.read_config(source).config
    if PRESET.value:
        return PRESETS[PRESET.value]
    if EMBED_DIM.value and HIDDEN_DIM.value:
        return MLPConfig(EMBED_DIM.value, HIDDEN_DIM.value, post_norm=POST_NORM.value)
    raise ValueError(
        "An Orbax checkpoint does not tell its model. Received: neither --preset, nor --embed_dim and --hidden_dim. "
        "Fix: give one or the other; or check that --source has a config.json, if it is a Hugging Face folder."
    )


def make_layout(name: str, config: MLPConfig, transpose: bool | None) -> Layout:
    options: dict[str, Any] = {}
    if name.startswith("deepmind"):
        options["transpose_gating_einsum"] = transpose
    if name == "deepmind_stacked":
        options["attention_types"] = ATTENTION_TYPES.value
    if name.startswith(("maxtext", "t5x")):
        options["round_norms"] = ROUND_NORMS.value
    return layouts.LAYOUTS[name](config, **options)


def call(path: Path, config: MLPConfig, huggingface: Any, orbax: Any) -> Any:
    return huggingface(path) if (path / "config.json").exists() else orbax(path, config)


def read(path: Path, config: MLPConfig, layout: Layout | None, what: str) -> list[MLPBlockParams]:
    options = {"dtype": DTYPE.value, "progress": functools.partial(tqdm, desc=what, unit="tensor")}
    huggingface = functools.partial(checkpoint.read_huggingface, **options)
    return call(path, config, huggingface, functools.partial(checkpoint.read_orbax, layout=layout, **options))


def print_table(shapes: list[MLPBlockParams], layout: Layout) -> None:
    """The tensors of the first layer, or of the first stacks, and the sum of all."""
    tensors = {name: make() for name, make in stored_tensors(dict(enumerate(shapes)), layout).items()}
    first = [layout.name(stored, 0) for stored in layout.stored]
    width = max(map(len, first))
    for name in first:
        print(f"{name:{width}}  {tensors[name].dtype!s:9} {list(tensors[name].shape)}")
    size = sum(tensor.size * tensor.dtype.itemsize for tensor in tensors.values())
    print(f"{len(tensors)} tensors for {len(shapes)} layers, {size / 2**20:,.1f} MiB")


def require_same(params: list[MLPBlockParams], again: list[MLPBlockParams]) -> None:
    """Norms that were stored as 1 + w come back wider, and with --round_norms as that 1 + w; all else bit for bit."""

    def same(a, b):
        wide = jnp.promote_types(a.dtype, b.dtype)
        a, b = a.astype(wide), b.astype(wide)
        return bool((a == b).all() or (ROUND_NORMS.value and a.ndim == 1 and (1 + a == 1 + b).all()))

    require(
        jax.tree.structure(params) == jax.tree.structure(again) and jax.tree.all(jax.tree.map(same, params, again)),
        "What is read back is what was written.",
        "other numbers",
        "the disk or a library is at fault: do not use the target.",
    )


if __name__ == "__main__":
    app.run(main)
