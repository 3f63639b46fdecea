"""The backend for NVIDIA's Hopper GPUs: Pallas kernels for h and for its gradients. The other matmuls are XLA's."""

from gemma_mlp.op.backend import Backend, run_kernel


def hidden(op, params, x, save_gate_up):
    from gemma_mlp.op import gpu_kernels  # Mosaic GPU is not in JAX on every system

    weights = [("DF", weight.astype(op.dtype)) for weight in (params.gate_proj, params.up_proj)]
    results = ["hidden"] * (3 if save_gate_up else 1)
    return run_kernel(op, gpu_kernels.hidden, [("rows", x), *weights], results, save_gate_up=save_gate_up)


def hidden_backward(op, params, dy, gate, up):
    from gemma_mlp.op import gpu_kernels

    arguments = [("rows", dy), ("FD", params.down_proj.astype(op.dtype)), ("hidden", gate), ("hidden", up)]
    return run_kernel(op, gpu_kernels.hidden_gradients, arguments, ["hidden"] * 3)


GPU = Backend(hidden=hidden, hidden_backward=hidden_backward, float32_slices=8)
