"""The backend for NVIDIA's Hopper GPUs: Pallas kernels for h and for its gradients. The other matmuls are XLA's."""

import functools

from gemma_mlp.mesh import run_on_mesh
from gemma_mlp.op.backend import Backend


def hidden(op, params, x, save_gate_up):
    from gemma_mlp.op import gpu_kernels  # Mosaic GPU is not in JAX on every system

    kernel = functools.partial(gpu_kernels.hidden, activation=op.config.activation, save_gate_up=save_gate_up)
    weights = [("DF", weight.astype(op.dtype)) for weight in (params.gate_proj, params.up_proj)]
    return run_on_mesh(kernel, [("rows", x), *weights], ["hidden"] * (3 if save_gate_up else 1), op.config.axis_rules)


def hidden_backward(op, params, dy, gate, up):
    from gemma_mlp.op import gpu_kernels

    kernel = functools.partial(gpu_kernels.hidden_gradients, activation=op.config.activation)
    arguments = [("rows", dy), ("FD", params.down_proj.astype(op.dtype)), ("hidden", gate), ("hidden", up)]
    return run_on_mesh(kernel, arguments, ["hidden"] * 3, op.config.axis_rules)


GPU = Backend(hidden=hidden, hidden_backward=hidden_backward, float32_slices=8)
