"""Relative L2 error of the bfloat16 feed-forward against the float64 oracle of the tests, at the Gemma 2 sizes.

    python scripts/accuracy.py                       # all three sizes
    python scripts/accuracy.py --sizes=gemma2_2b

`floor` is the oracle with each array that has to be stored (h, y, the gradients of gate and up, each result) rounded
to bfloat16 once. `plain` is the formula written in bfloat16 JAX, `(gelu(x @ gate) * (x @ up)) @ down`.
"""

import functools
import json
import platform
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from plain import plain
from tqdm import tqdm

import gemma_mlp

sys.path.append(str(Path(__file__).parents[1]))
from tests import reference, samples

SIZES = flags.DEFINE_list("sizes", ["gemma2_2b", "gemma2_9b", "gemma2_27b"], "Names of presets.")
TOKENS = flags.DEFINE_integer("tokens", 64, "T, the number of tokens.", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "Also write the table to this file.")

COLUMNS = ("y", "dx", "gate_proj", "up_proj", "down_proj")


def main(argv):
    logging.set_verbosity(logging.WARNING)  # JAX and Orbax tell of much at INFO
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    rows = []
    versions = f"JAX {jax.__version__}, {jax.default_backend()}, Python {platform.python_version()}"
    print(f"Relative L2 error x 1000, {TOKENS.value} tokens, bfloat16; {versions}")
    print(f"{'':12}{'':18}" + "".join(f"{name:>11}" for name in COLUMNS))
    for size in SIZES.value:
        for name, errors in tqdm(measure(gemma_mlp.PRESETS[size], TOKENS.value), desc=size, total=4, leave=False):
            rows.append({"size": size, "implementation": name, **errors})
            tqdm.write(f"{size:12}{name:18}" + "".join(f"{1000 * errors[column]:11.3f}" for column in COLUMNS))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps({"versions": versions, "tokens": TOKENS.value, "rows": rows}, indent=2))


def measure(config: gemma_mlp.MLPConfig, tokens: int):
    """Yields (implementation, {column: relative error}), one implementation in memory at a time."""
    rng = np.random.default_rng(0)
    arrays = samples.mlp_arrays(rng, config.embed_dim, config.hidden_dim, use_bias=False)
    x, dy = (samples.normal(rng, (tokens, config.embed_dim)) for _ in range(2))
    exact = oracle(arrays, x, dy, reference.exact)

    def errors(result):
        return {name: reference.relative_error(result.pop(name), exact[name]) for name in COLUMNS}

    def run(function):
        params = samples.mlp_params(arrays, "bfloat16")
        compute = jax.jit(lambda params, x, dy: samples.value_and_pullback(function, params, x, dy))
        y, dparams, dx = compute(params, jnp.asarray(x, "bfloat16"), dy)
        return {"y": y, "dx": dx, **samples.mlp_leaves(dparams)}

    yield "floor", errors(oracle(arrays, x, dy, reference.bfloat16))
    yield "save=input", errors(run(functools.partial(gemma_mlp.feed_forward, save="input")))
    yield "save=gate_up", errors(run(functools.partial(gemma_mlp.feed_forward, save="gate_up")))
    yield "plain", errors(run(plain))


def oracle(arrays, x, dy, stored):
    y, _ = reference.mlp(arrays, x, "gelu_tanh", stored)
    dparams, dx = reference.mlp_gradients(arrays, x, dy, "gelu_tanh", stored)
    return {"y": y, "dx": dx, **dparams}


if __name__ == "__main__":
    app.run(main)
