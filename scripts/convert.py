"""Converts the block's parameters from one library's file to another's, then reads the result back and compares.

    python scripts/convert.py --source=HF_FOLDER --target=NEW --to=deepmind_flat --transpose_gating_einsum=true
    python scripts/convert.py --source=ORBAX --preset=gemma2_2b --target=NEW --to=tunix
    python scripts/convert.py --source=ORBAX --embed_dim=64 --hidden_dim=256 --target=HF_FOLDER --to=huggingface

    python scripts/convert.py --source=HF_FOLDER --target=NEW --to=gemma_mlp --quantize=int4 --group_size=32
    python scripts/convert.py --source=MODEL.gguf --target=NEW --to=huggingface --dequantize --dtype=bfloat16
    python scripts/convert.py --source=HF_FOLDER --adapters=PEFT_FOLDER --target=NEW --to=huggingface
    python scripts/convert.py --source=PEFT_FOLDER --target=NEW --to=deepmind_lora --widen

A source with a config.json is a Hugging Face folder, one that ends in .gguf is a GGUF file, and one with an
adapter_config.json is a folder of PEFT. Any other source is an Orbax checkpoint, and the names of its tensors tell its
layout. Quantised weights stay so if the target is of the layout gemma_mlp; others need --dequantize. If the target is a
Hugging Face folder that exists, its MLP blocks are replaced and all else stays. Any other target must be new. At the
end, the parameters of the source and of the result are both in memory.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli
import jax
import jax.numpy as jnp
from absl import flags
from interruption import interruptible
from tqdm import tqdm

from gemma_mlp import PRESETS, MLPBlockParams, MLPConfig, checkpoint, checks, dequantize, layouts, merge_lora, quantize
from gemma_mlp.checkpoint import addresses, compressed
from gemma_mlp.weights import WEIGHT_DTYPES

LAYOUTS = list(layouts.LAYOUTS)
DTYPES = ["bfloat16", "float32", "float64"]
OF_ADAPTERS = ["peft", "deepmind_lora"]
SOURCE = flags.DEFINE_string("source", None, "What to read: a Hugging Face folder, GGUF, Orbax, PEFT.", required=True)
TARGET = flags.DEFINE_string("target", None, "The folder to write.", required=True)
TO = flags.DEFINE_enum(
    "to", None, [*LAYOUTS, *OF_ADAPTERS], "The layout to write; peft, deepmind_lora: of adapters alone.", required=True
)
PRESET = flags.DEFINE_enum("preset", None, list(PRESETS), "The model of an Orbax source.")
EMBED_DIM = flags.DEFINE_integer("embed_dim", None, "D of an Orbax source, instead of --preset.", lower_bound=1)
HIDDEN_DIM = flags.DEFINE_integer("hidden_dim", None, "F of an Orbax source, instead of --preset.", lower_bound=1)
POST_NORM = flags.DEFINE_boolean("post_norm", True, "Whether an Orbax source has a norm after the MLP (Gemma 1: no).")
PART = flags.DEFINE_enum("part", None, ["encoder", "decoder"], "The part of a Hugging Face folder of a T5Gemma.")
TRANSPOSE = flags.DEFINE_boolean(
    "transpose_gating_einsum", None, "deepmind*: write gating_einsum as (2, F, D), or else (2, D, F)."
)
FROM = flags.DEFINE_enum("from", None, LAYOUTS, "The layout of an Orbax source. By default its names tell it.")
SOURCE_TRANSPOSE = flags.DEFINE_boolean(
    "source_transpose_gating_einsum", None, "With --from=deepmind*: the source has (2, F, D). Needed where D = F."
)
ATTENTION_TYPES = flags.DEFINE_integer("attention_types", 2, "deepmind_stacked: the length of the attention pattern.")
SCALE_PLUS_ONE = flags.DEFINE_boolean(
    "scale_plus_one", True, "Whether the norms of an Orbax source multiply by 1 + w (Gemma 3n and 4: by w)."
)
ROUND_NORMS = flags.DEFINE_boolean("round_norms", False, "maxtext*, t5x: round a norm if 1 + w cannot hold its w.")
DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Cast the parameters. By default their bits stay as they are.")
ADAPTERS = flags.DEFINE_string("adapters", None, "Adapters to merge into the weights: a folder of PEFT, or Orbax.")
DEQUANTIZE = flags.DEFINE_boolean("dequantize", False, "Write dense weights in place of quantised ones.")
QUANTIZE = flags.DEFINE_enum("quantize", None, list(WEIGHT_DTYPES), "Quantise the weights, for --to=gemma_mlp*.")
GROUP_SIZE = flags.DEFINE_integer(
    "group_size", None, "--quantize: how many numbers share a scale. By default all of a channel.", lower_bound=1
)
WIDEN = flags.DEFINE_boolean("widen", False, "deepmind_lora: use a larger rank where theirs would not hold adapters.")
PREFIX = flags.DEFINE_string("prefix", "model.", "peft: of the layers, model.language_model. in multimodal models.")
BASE_MODEL = flags.DEFINE_string("base_model", None, "peft: the name of the model that the adapters are for.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Check names, shapes and dtypes, print the table, write nothing.")


def main():
    try:
        with interruptible(lambda: saved(TARGET.value)):
            convert(SOURCE.value, TARGET.value)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def saved(target: str) -> str:
    """What an interrupted conversion has saved, for people."""
    if not Path(target).expanduser().exists():
        return f"{target} is not written. The same command starts over."
    return f"{target} is whole, as it was or as the conversion makes it, but it is not compared with the source."


def convert(source: str, target: str) -> None:
    if TO.value in OF_ADAPTERS:
        convert_adapters(source, target)
        return
    checks.require(
        not is_peft(source),
        "The source must be a whole model.",
        f"{source}, which holds adapters",
        f"give them by --adapters and their model by --source, or convert them alone: --to={' or '.join(OF_ADAPTERS)}.",
    )
    checks.require(
        GROUP_SIZE.value is None or QUANTIZE.value is not None,
        "--group_size must come with --quantize.",
        f"--group_size={GROUP_SIZE.value} alone",
        f"choose --quantize={', '.join(WEIGHT_DTYPES)}.",
    )
    if TO.value == "huggingface":
        target = str(addresses.local_folder(target, new=True))  # refuses a URL before anything is read
    config = source_config(source)
    layout = make_layout(TO.value, config, TRANSPOSE.value)
    source_layout = make_layout(FROM.value, config, SOURCE_TRANSPOSE.value) if FROM.value else None
    change = changes()
    params = None
    if is_low_bit(source):
        params = read(source, config, None, PART.value, None if DEQUANTIZE.value else DTYPE.value, "reading")
    shapes = read_shapes(source, config, source_layout) if params is None else params
    print_table(jax.eval_shape(change, shapes), layout)
    exists = Path(target).expanduser().exists()
    in_place = TO.value == "huggingface" and exists
    if in_place:
        require_same_norms(config, target)
    checks.require(in_place or not exists, "The target must be new.", f"{target}, which exists", "use another.")
    if DRY_RUN.value:
        if in_place:
            checkpoint.huggingface_shapes(target, part=PART.value)
        print("Dry run: nothing is written.")
        return
    if params is None:
        dtype = None if DEQUANTIZE.value else DTYPE.value
        params = read(source, config, source_layout, PART.value, dtype, "reading")
    params = change(params)
    if in_place:
        checkpoint.update_huggingface(target, params, part=PART.value)
    elif TO.value == "huggingface":
        checkpoint.write_huggingface(target, params, config)
    else:
        checkpoint.write_orbax(target, params, layout)
    part = PART.value if in_place else None  # a new folder has no parts
    rounded = ROUND_NORMS.value and config.scale_plus_one
    require_same(params, read(target, config, layout, part, DTYPE.value, "verifying"), rounded)
    print(f"{target}: {len(params)} layers, read back and the same, bit for bit.")


def changes() -> Callable[[list[MLPBlockParams]], list[MLPBlockParams]]:
    """What is done to the parameters between reading and writing."""
    adapters = read_adapters(ADAPTERS.value) if ADAPTERS.value else None

    def change(params):
        if DEQUANTIZE.value:
            params = dequantize(params, DTYPE.value)
            params = jax.tree.map(lambda leaf: leaf.astype(DTYPE.value or leaf.dtype), params)
        if adapters is not None:
            params = merge_lora(layouts.insert_adapters(params, adapters))
        if QUANTIZE.value:
            params = quantize(params, QUANTIZE.value, GROUP_SIZE.value)
        return params

    return change


def convert_adapters(source: str, target: str) -> None:
    adapters = read_adapters(source)
    tree = layouts.adapters_to_deepmind(adapters, widen=WIDEN.value) if TO.value == "deepmind_lora" else None
    exists = Path(target).expanduser().exists()
    checks.require(not exists, "The target must be new.", f"{target}, which exists", "use another.")
    for name, (a, b, factor) in next(iter(adapters.values())).items():
        print(f"{name:9}  {a.dtype} {list(a.shape)} {list(b.shape)}, factor {factor:g}")
    print(f"adapters of {len(adapters)} layers")
    if DRY_RUN.value:
        print("Dry run: nothing is written.")
        return
    if tree is None:
        checkpoint.write_adapters(target, adapters, base_model=BASE_MODEL.value, prefix=PREFIX.value)
    else:
        checkpoint.write_orbax_adapters(target, adapters, widen=WIDEN.value)
        adapters = layouts.adapters_from_deepmind(tree)
    require_same(jax.tree.map(jnp.asarray, adapters), jax.tree.map(jnp.asarray, read_adapters(target)), False)
    print(f"{target}: adapters of {len(adapters)} layers, read back and the same, bit for bit.")


def read_adapters(path: str) -> layouts.Adapters:
    """Adapters in a folder of PEFT, or of DeepMind's `gm.nn.LoRA` in Orbax."""
    if is_peft(path):
        return checkpoint.read_adapters(path, part=PART.value, dtype=DTYPE.value)
    return checkpoint.read_orbax_adapters(path)


def is_huggingface(path: str) -> bool:
    return (Path(path).expanduser() / "config.json").exists()


def is_gguf(path: str) -> bool:
    return path.endswith(".gguf")


def is_peft(path: str) -> bool:
    return (Path(path).expanduser() / "adapter_config.json").exists() and not is_huggingface(path)


def is_low_bit(path: str) -> bool:
    """Whether shapes cannot be read without the values."""
    return is_gguf(path) or (is_huggingface(path) and compressed.is_compressed(Path(path).expanduser()))


def source_config(source: str) -> MLPConfig:
    if is_gguf(source):
        return checkpoint.read_gguf_config(source).config
    if is_huggingface(source):
        return checkpoint.read_config(source, part=PART.value).config
    if PRESET.value:
        return PRESETS[PRESET.value]
    if EMBED_DIM.value and HIDDEN_DIM.value:
        plus_one = SCALE_PLUS_ONE.value
        return MLPConfig(EMBED_DIM.value, HIDDEN_DIM.value, post_norm=POST_NORM.value, scale_plus_one=plus_one)
    raise ValueError(
        "The model of an Orbax checkpoint must be given. Got: neither --preset, nor --embed_dim and --hidden_dim. "
        "Fix: give one or the other; for a Hugging Face folder, download it and check that it has a config.json."
    )


def make_layout(name: str, config: MLPConfig, transpose: bool | None) -> layouts.Layout:
    """The layout with those options that it takes."""
    options = {
        "transpose_gating_einsum": transpose,
        "attention_types": ATTENTION_TYPES.value,
        "round_norms": ROUND_NORMS.value,
    }
    make = layouts.LAYOUTS[name]
    return make(config, **{key: options[key] for key in options.keys() & inspect.signature(make).parameters})


def read_shapes(path: str, config: MLPConfig, layout: layouts.Layout | None) -> list[MLPBlockParams]:
    if is_huggingface(path):
        return checkpoint.huggingface_shapes(path, part=PART.value, dtype=DTYPE.value)
    exists = "://" in path or Path(path).expanduser().exists()
    checks.require(exists, f"{path} must be an Orbax checkpoint.", "no such folder", "check the path.")
    return checkpoint.orbax_shapes(path, config, layout=layout, dtype=DTYPE.value)


def read(
    path: str, config: MLPConfig, layout: layouts.Layout | None, part: str | None, dtype: str | None, what: str
) -> list[MLPBlockParams]:
    progress = functools.partial(tqdm, desc=what, unit="tensor")
    if is_gguf(path):
        return checkpoint.read_gguf(path, dtype=dtype, round_norms=ROUND_NORMS.value, progress=progress)
    if is_huggingface(path):
        return checkpoint.read_huggingface(path, part=part, dtype=dtype, progress=progress)
    return checkpoint.read_orbax(path, config, layout=layout, dtype=dtype, progress=progress)


def require_same_norms(config: MLPConfig, target: str) -> None:
    theirs = checkpoint.read_configs(target, part=PART.value)[0].scale_plus_one
    checks.require(
        theirs == config.scale_plus_one,
        f"The norms of {target} multiply by {'1 + w' if theirs else 'w'}, so those of the source must too.",
        f"scale_plus_one={config.scale_plus_one}",
        "for an Orbax source, give the --preset of its model or --noscale_plus_one; else choose another target.",
    )


def print_table(shapes: list[MLPBlockParams], layout: layouts.Layout) -> None:
    """The tensors of the first layer (or the stacks that hold it), and the size of all tensors."""
    tensors = layouts.flatten(layouts.to_tree(shapes, layout), layout.separator)
    parts = ("", "/qvalue", "/scale")
    first = [layout.name(stored, 0) + part for stored in layout.stored for part in parts]
    first = [name for name in first if name in tensors]
    width = max(map(len, first))
    for name in first:
        print(f"{name:{width}}  {tensors[name].dtype!s:9} {list(tensors[name].shape)}")
    bits = sum(tensor.size * jax.dtypes.itemsize_bits(tensor.dtype) for tensor in tensors.values())
    print(f"{len(tensors)} tensors for {len(shapes)} layers, {bits / 2**23:,.1f} MiB")


def require_same(params: Any, again: Any, rounded: bool) -> None:
    """Compares all bits, in the wider dtype. If norms may be rounded, it is enough that their 1 + w is the same."""

    def same(a, b):
        wide = jnp.promote_types(a.dtype, b.dtype)
        a, b = a.astype(wide), b.astype(wide)
        return bool((a == b).all() or (rounded and a.ndim == 1 and (1 + a == 1 + b).all()))

    checks.require(
        jax.tree.structure(params) == jax.tree.structure(again) and jax.tree.all(jax.tree.map(same, params, again)),
        "What is read back must be what was written.",
        "other numbers",
        "the disk or a library is at fault: do not use the target.",
    )


if __name__ == "__main__":
    cli.run(main)
