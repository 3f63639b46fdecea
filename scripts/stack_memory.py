"""Temporary memory of the feed-forward's gradient on TPUs and the H200, from their compilers.

    JAX_PLATFORMS=cpu python scripts/stack_memory.py  # on any machine; needs the aot extra

Four layers under scan and four unrolled, 8,192 tokens, bfloat16, Gemma 2 2B. `plain` is the formula as JAX
differentiates it.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
from absl import app, flags, logging
from plain import plain
from tqdm import tqdm

from gemma_mlp import PRESETS, MLPParams, aot, mlp

JSON = flags.DEFINE_string("json", "", "Also write the table to this file.")

MIB = 2**20
TOKENS, LAYERS = 8192, 4


def config(size, save="input"):
    return dataclasses.replace(PRESETS[f"gemma2_{size}"], param_dtype="bfloat16", save=save)


def params(config, layers=None):
    shapes = jax.eval_shape(lambda: MLPParams.init(config, jax.random.key(0)))
    lead = () if layers is None else (layers,)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), shapes)


def stream(config, tokens=TOKENS):
    return jax.ShapeDtypeStruct((tokens, config.embed_dim), "bfloat16")


def array(config):
    """One [T, F] in bfloat16, in bytes."""
    return TOKENS * config.hidden_dim * 2


def apply(config):
    return lambda params, x: mlp(params, x, config)


def scanned(layer):
    def loss(params, x):
        return jax.lax.scan(lambda x, p: (x + layer(p, x), None), x, params)[0].astype("float32").sum()

    return jax.grad(loss, argnums=(0, 1))


def unrolled(layer):
    def loss(params, x):
        for i in range(LAYERS):
            x = x + layer(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
        return x.astype("float32").sum()

    return jax.grad(loss, argnums=(0, 1))


@functools.cache
def stack_bytes(target, stack, layer, size, triton=None):
    """Temporary memory of the gradient of a stack of layers. `layer`: a save policy, or "plain"; `triton`: the H200's
    products through Triton or through cuBLASLt."""
    settings = config(size) if layer == "plain" else config(size, layer)
    function = {"scanned": scanned, "unrolled": unrolled}[stack](plain if layer == "plain" else apply(settings))
    options = None if triton is None else {"xla_gpu_enable_triton_gemm": triton}
    arguments = (params(settings, LAYERS), stream(settings))
    return aot.compile_for(target, function, *arguments, compiler_options=options).temp_bytes


COLUMNS = {
    "v5e": ("tpu v5e:2x2", None),
    "v5p": ("tpu v5p:2x2x1", None),
    "v6e": ("tpu v6e:2x2", None),
    "H200 Triton": ("h200", True),
    "H200 cuBLASLt": ("h200", False),
}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    rows = []
    cells = [(stack, layer) for stack in ("scanned", "unrolled") for layer in ("plain", "gate_up", "input")]
    print(f"MiB{'':17}" + "".join(f"{name:>15}" for name in COLUMNS) + f"   JAX {jax.__version__}")
    with tqdm(total=len(cells) * len(COLUMNS)) as bar:
        for stack, layer in cells:
            row: dict[str, str | int] = {"stack": stack, "layer": layer}
            for name, (target, triton) in COLUMNS.items():
                row[name] = stack_bytes(target, stack, layer, "2b", triton) // MIB
                bar.update()
            rows.append(row)
            tqdm.write(f"{stack:10}{layer:10}" + "".join(f"{row[name]:15}" for name in COLUMNS))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    app.run(main)
