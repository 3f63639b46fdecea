"""The backend for TPUs: Pallas kernels for the forward pass, for h alone, and for both kinds of backward pass.

Pallas takes as long to import as the rest of this package. Each function imports it when a kernel is asked for.
"""

from gemma_mlp.op.backend import Backend, run_kernel
from gemma_mlp.params import LEAVES, WEIGHTS, MLPParams


def forward(op, params, x, save_gate_up):
    from gemma_mlp.op import tpu_forward

    arguments, results = [("rows", x), *_weights(params)], ["sum", *["hidden"] * (2 * save_gate_up)]
    return run_kernel(op, tpu_forward.fused_forward, arguments, results, save_gate_up=save_gate_up)


def hidden(op, params, x, save_gate_up):
    from gemma_mlp.op import tpu_forward

    assert not save_gate_up  # `forward` does that
    return run_kernel(op, tpu_forward.hidden_only, [("rows", x), *_weights(params)[:2]], ["hidden"])


def backward(op, params, x, dy):
    from gemma_mlp.op import tpu_backward

    arguments = [("rows", x), ("rows", dy), *_weights(params)]
    dx, *dweights = run_kernel(op, tpu_backward.fused_backward, arguments, ["sum", *(LEAVES[name] for name in WEIGHTS)])
    return MLPParams(*dweights), dx


def weight_backward(op, params, dy, gate, up):
    from gemma_mlp.op import tpu_backward

    arguments = [("rows", dy), ("hidden", gate), ("hidden", up), ("FD", params.down_proj)]
    return run_kernel(op, tpu_backward.backward_from_saved, arguments, ["hidden", "hidden", "FD"])


def _weights(params):
    return [(LEAVES[name], getattr(params, name)) for name in WEIGHTS]


TPU = Backend(
    forward=forward,
    hidden=hidden,
    backward=backward,
    weight_backward=weight_backward,
    lacks=("gelu",),  # Mosaic has no erfc
)
