"""Compiles the GPU kernels for the H200, case by case. tests/aot/test_gpu.py runs it in a process of its own.

The compilers describe a kernel on standard error, once per process, and abort the process if they find no libdevice.
"""

import functools
import json

import jax

from gemma_mlp import ACTIVATIONS, aot

SIZES = {"gemma2_2b": (2304, 9216), "gemma2_9b": (3584, 14336), "gemma2_27b": (4608, 36864)}
KERNELS = ["hidden", "hidden_gradients"]
SERVED_TOKENS = (8192, 16, 1)
SERVED = [(kernel, tokens, *SIZES[size]) for kernel in KERNELS for size in SIZES for tokens in SERVED_TOKENS]
LARGE = [(kernel, 65536, *SIZES["gemma2_27b"]) for kernel in KERNELS]  # 2.4e9 elements in each result
UNEVEN = [(kernel, 8190, *SIZES["gemma2_2b"], "gelu_tanh") for kernel in KERNELS]
OTHER_ACTIVATIONS = [name for name in ACTIVATIONS if name != "gelu_tanh"]
CASES = [(*case, "gelu_tanh") for case in SERVED + LARGE] + UNEVEN
CASES += [(kernel, 128, 512, 256, activation) for kernel in KERNELS for activation in OTHER_ACTIVATIONS]
START, END = "=== start", "=== end "


def saves(tokens):
    """Whether the forward kernel of a case also returns gate and up, for the backward pass."""
    return tokens not in SERVED_TOKENS


def compile_all():
    from gemma_mlp.op import gpu_kernels  # Mosaic GPU is not in JAX on every system

    for kernel, T, D, F, activation in CASES:
        print(START, flush=True)
        if kernel == "hidden":
            shapes, options, donated = ((T, D), (D, F), (D, F)), {"save_gate_up": saves(T)}, ()
        else:
            shapes, options, donated = ((T, D), (F, D), (T, F), (T, F)), {}, (2, 3)
        results = functools.partial(getattr(gpu_kernels, kernel), activation=activation, **options)

        def h_last(*args):
            """JAX lets the first results overwrite the donated gate and up, so h comes last."""
            h, *others = results(*args)
            return *others, h

        args = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes)
        compiled = aot.compile_for("h200", h_last, *args, donate_argnums=donated)
        report = compiled.temp_bytes, compiled.output_bytes - compiled.alias_bytes, compiled.text
        print(END + json.dumps(report), flush=True)


if __name__ == "__main__":
    compile_all()
