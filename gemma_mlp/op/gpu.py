"""The backend for NVIDIA's Hopper GPUs: Pallas kernels for h and for its gradients. The other matmuls are XLA's."""

import functools

from gemma_mlp.mesh import OnMesh
from gemma_mlp.op.backend import Backend


def hidden(op, params, x, save):
    from gemma_mlp.op import gpu_kernels  # Mosaic GPU is not in JAX on every system

    kernel = functools.partial(gpu_kernels.hidden, activation=op.config.activation, save=save)
    weights = [("DF", weight.astype(op.dtype)) for weight in (params.gate_proj, params.up_proj)]
    return _on_mesh(op, params, x).run(kernel, [("rows", x), *weights], ["hidden"] * (3 if save else 1))


def hidden_backward(op, params, dy, gate, up):
    from gemma_mlp.op import gpu_kernels

    kernel = functools.partial(gpu_kernels.hidden_gradients, activation=op.config.activation)
    down_proj = params.down_proj.astype(op.dtype)
    arguments = [("rows", dy), ("FD", down_proj), ("hidden", gate), ("hidden", up)]
    return _on_mesh(op, params, dy).run(kernel, arguments, ["hidden"] * 3)


def _on_mesh(op, params, x):
    return OnMesh(x.shape, params.gate_proj.shape[1], op.config.axis_rules)


GPU = Backend(hidden=hidden, hidden_backward=hidden_backward, float32_slices=8)
