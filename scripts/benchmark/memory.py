"""Measures the temporary memory of the feed-forward's gradient in bfloat16, as the compilers report it.

There are three stacks: one layer, several layers under scan, and several layers unrolled. The layer `plain` is the
formula as JAX differentiates it, `remat` is `plain` under `jax.checkpoint`, and `pallas` uses the package's kernels.
Parameters are bfloat16, or float32 where the layer's name ends in f32.
"""

from gemma_mlp import aot
from gemma_mlp.testing.stacks import MIB, STACKS, gradient_bytes

# column: (target, one of the sets of compiler options in `stacks.OPTIONS`)
COMPILERS = {
    "CPU": ("cpu", None),
    "v5e": ("tpu v5e:2x2", None),
    "v5p": ("tpu v5p:2x2x1", None),
    "v6e": ("tpu v6e:2x2", None),
    "7x": ("tpu tpu7x:2x2x1", None),
    "7x small tiles": ("tpu tpu7x:2x2x1", "small tiles"),
    "H200 Triton": ("h200", "triton"),
    "H200 cuBLASLt": ("h200", "cublaslt"),
}


def compilers(columns=COMPILERS):
    """Returns the columns whose compiler is installed, and the reason why each other column is missing."""
    found, missing = {}, {}
    for name, (target, options) in columns.items():
        try:
            aot.devices(target)
            found[name] = target, options
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def measure(preset, compilers, *, tokens, layers, chunk_size):
    """Yields a row for each stack and layer: the MiB in each column, or None if the program does not fit the chip."""
    cells = [("plain", None), ("remat", None), ("gate_up", None), ("input", None), ("input", chunk_size)]
    cells = [(*cell, "bfloat16") for cell in cells] + [("input", None, "float32")]
    kernels = {column: compiler for column, compiler in compilers.items() if compiler[0] != "cpu"}
    if kernels:
        cells += [("pallas", None, "bfloat16"), ("pallas", None, "float32")]
    for stack in STACKS:
        for layer, chunk, param_dtype in cells:
            name = layer if param_dtype == "bfloat16" else f"{layer} f32"
            row = {"stack": stack, "layer": name, "chunk_size": chunk}
            for column, (target, options) in (kernels if layer == "pallas" else compilers).items():
                sizes = {"tokens": tokens, "layers": layers, "chunk_size": chunk, "param_dtype": param_dtype}
                try:
                    row[column] = gradient_bytes(target, stack, layer, preset, options, **sizes) / MIB
                except aot.DoesNotFit:
                    row[column] = None
            yield row
