"""The backend for TPUs: Pallas kernels for the forward pass, for h alone, and for both kinds of backward pass."""

import functools

from gemma_mlp.mesh import OnMesh
from gemma_mlp.op import tpu_backward, tpu_forward
from gemma_mlp.op.backend import Backend
from gemma_mlp.params import LEAVES, WEIGHTS, MLPParams


def forward(op, params, x, save):
    kernel = functools.partial(tpu_forward.fused_forward, activation=op.config.activation, save=save)
    return _on_mesh(op, params, x).run(kernel, [("rows", x), *_weights(params)], ["sum", *["hidden"] * (2 * save)])


def hidden(op, params, x, save):
    assert not save  # `forward` is one kernel and saves gate and up by itself
    kernel = functools.partial(tpu_forward.hidden_only, activation=op.config.activation)
    return _on_mesh(op, params, x).run(kernel, [("rows", x), *_weights(params)[:2]], ["hidden"])


def backward(op, params, x, dy):
    kernel = functools.partial(tpu_backward.fused_backward, activation=op.config.activation)
    arguments = [("rows", x), ("rows", dy), *_weights(params)]
    dx, *dweights = _on_mesh(op, params, x).run(kernel, arguments, ["sum", *(LEAVES[name] for name in WEIGHTS)])
    return MLPParams(*dweights), dx


def weight_backward(op, params, dy, gate, up):
    kernel = functools.partial(tpu_backward.backward_from_saved, activation=op.config.activation)
    arguments = [("rows", dy), ("hidden", gate), ("hidden", up), ("FD", params.down_proj)]
    return _on_mesh(op, params, dy).run(kernel, arguments, ["hidden", "hidden", "FD"])


def _on_mesh(op, params, x):
    return OnMesh(x.shape, params.gate_proj.shape[1], op.config.axis_rules)


def _weights(params):
    return [(LEAVES[name], getattr(params, name)) for name in WEIGHTS]


TPU = Backend(
    forward=forward,
    hidden=hidden,
    backward=backward,
    weight_backward=weight_backward,
    lacks=("gelu",),  # Mosaic has no erfc
)
