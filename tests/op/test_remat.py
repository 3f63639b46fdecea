"""How many matmuls a layer takes with each `save` under a user's own remat.

They are counted in the program that JAX hands to the compiler. tests/aot counts them in compiled programs.
"""

import dataclasses
import functools

import jax
import pytest

from gemma_mlp import MLPBlockParams, MLPConfig, mlp_block

CONFIG = MLPConfig(8, 16, dtype="bfloat16")
REMAT = {
    "none": lambda block: block,
    "all": functools.partial(jax.checkpoint, prevent_cse=False),
    "policy": functools.partial(
        jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names("mlp_out")
    ),
}
MATMULS = {
    "input": {"none": 11, "all": 14, "policy": 11},  # 14: the one combination that the documentation advises against
    "gate_up": {"none": 9, "all": 12, "policy": 11},
    "autodiff": {"none": 9, "all": 12, "policy": 11},
}


def count_matmuls(config, remat):
    """The matmuls of a layer's forward and backward pass, in a scanned stack that is lowered for a TPU."""
    shapes = jax.eval_shape(lambda: MLPBlockParams.init(config, jax.random.key(0)))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape), leaf.dtype), shapes)
    step = remat(lambda params, x: mlp_block(params, x, config))

    def loss(params, x):
        return jax.lax.scan(lambda x, p: (step(p, x), None), x, params)[0].astype("float32").sum()

    x = jax.ShapeDtypeStruct((4, config.embed_dim), "bfloat16")
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(stacked, x).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("stablehlo.dot_general")


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("save", MATMULS)
def test_matmuls_of_a_layer(save, remat):
    assert count_matmuls(dataclasses.replace(CONFIG, save=save), REMAT[remat]) == MATMULS[save][remat]
