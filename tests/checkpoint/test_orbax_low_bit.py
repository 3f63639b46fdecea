"""Orbax checkpoints with quantised weights and with adapters: ours in and out, and what Orbax itself has saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import gemma_mlp
from gemma_mlp import LoRA, MLPConfig, QuantizedWeight, add_lora, checkpoint, layouts, quantize
from gemma_mlp.layouts.trees import block_leaves
from tests.support import by_hand

D, F, LAYERS = 32, 64, 3
CONFIG = MLPConfig(D, F)

pytestmark = pytest.mark.promotes  # Orbax relies on promotion


def quantised(dtype="int4", group_size=16, of_arrays="float32"):
    return quantize(by_hand.params(by_hand.arrays(CONFIG, LAYERS, of_arrays)), dtype, group_size)


def equal(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (ours, expected))):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.astype("float32"), b.astype("float32"))


KINDS = [("int4", 16), ("int4", None), ("int8", 32), ("int8", None), ("float8_e4m3fn", None)]


@pytest.mark.parametrize(("dtype", "group_size"), KINDS)
@pytest.mark.parametrize("stacked", [False, True])
def test_what_is_written_is_read_back(tmp_path, dtype, group_size, stacked):
    layers = quantised(dtype, group_size)
    checkpoint.write_orbax(tmp_path / "c", layers, layouts.gemma_mlp(CONFIG, stacked=stacked))
    equal(checkpoint.read_orbax(tmp_path / "c", CONFIG), layers)
    equal(checkpoint.read_orbax(tmp_path / "c", CONFIG, layers=[2, 0]), [layers[2], layers[0]])
    equal(checkpoint.read_orbax(tmp_path / "c", CONFIG, stacked=True), layouts.stack(layers))
    assert checkpoint.orbax_shapes(tmp_path / "c", CONFIG) == jax.eval_shape(lambda: layers)
    cast = checkpoint.read_orbax(tmp_path / "c", CONFIG, dtype="bfloat16")
    assert checkpoint.orbax_shapes(tmp_path / "c", CONFIG, dtype="bfloat16") == jax.eval_shape(lambda: cast)
    for ours, full in zip(jax.tree.leaves(cast), jax.tree.leaves(layers)):
        np.testing.assert_array_equal(ours, full.astype(ours.dtype))


def test_some_weights_are_quantised(tmp_path):
    layers = quantised()
    plain = by_hand.params(by_hand.arrays(CONFIG, LAYERS, "float32"))
    layers[1] = dataclasses.replace(plain[1], mlp=dataclasses.replace(layers[1].mlp, down_proj=plain[1].mlp.down_proj))
    layers[2] = plain[2]
    checkpoint.write_orbax(tmp_path / "c", layers, layouts.gemma_mlp(CONFIG))
    equal(checkpoint.read_orbax(tmp_path / "c", CONFIG), layers)
    equal(checkpoint.read_orbax(tmp_path / "c", CONFIG, layers=[2], stacked=True), layouts.stack(layers[2:]))
    with pytest.raises(ValueError, match=r"A stack needs layers whose gate_proj is of one kind.*float32.* and .*int4"):
        checkpoint.read_orbax(tmp_path / "c", CONFIG, stacked=True)


def test_a_model_of_nnx_in_an_item_next_to_another(tmp_path):
    model = nnx.Module()
    for i in range(LAYERS):
        setattr(model, f"layers_{i}", gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(i)))
        gemma_mlp.nnx.quantize(getattr(model, f"layers_{i}"), "int8")
    items = {"params": ocp.args.StandardSave(nnx.state(model)), "other": ocp.args.StandardSave({"step": jnp.ones(1)})}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", ocp.args.Composite(**items))
    for i, layer in enumerate(checkpoint.read_orbax(tmp_path / "c", CONFIG)):
        theirs = getattr(model, f"layers_{i}")
        assert isinstance(layer.mlp.up_proj, QuantizedWeight)
        np.testing.assert_array_equal(layer.mlp.up_proj.qvalue, theirs.mlp.up_proj.qvalue[...])
        np.testing.assert_array_equal(layer.mlp.up_proj.scale, theirs.mlp.up_proj.scale[...])


@pytest.mark.parametrize("stacked", [False, True])
def test_onto_a_mesh(tmp_path, stacked, eight_devices):
    layers = quantised("int8", None)
    checkpoint.write_orbax(tmp_path / "c", layers, layouts.gemma_mlp(CONFIG))
    mesh = jax.make_mesh((8,), ("tensor",))
    lead = (None,) if stacked else ()
    axes = {"gate_proj": (None, "tensor"), "up_proj": (None, "tensor"), "down_proj": ("tensor", None)}
    axes |= {"pre_norm": (), "post_norm": ()}
    places = {leaf: jax.NamedSharding(mesh, jax.P(*lead, *spec)) for leaf, spec in axes.items()}
    options = {"shardings": layouts.make_params(places), "stacked": stacked}
    read = checkpoint.read_orbax(tmp_path / "c", CONFIG, **options)
    equal(read, layouts.stack(layers) if stacked else layers)
    leaves = block_leaves(read if stacked else read[1])
    for name, leaf in leaves.items():
        qvalue = leaf.qvalue if isinstance(leaf, QuantizedWeight) else leaf
        assert qvalue.sharding == places[name]
    assert leaves["down_proj"].scale.sharding.spec == jax.P(*lead, None, None)  # one scale for each channel
    assert leaves["up_proj"].scale.sharding == places["up_proj"]


def saved(path, layers, change):
    """Saved by Orbax alone."""
    tree = layouts.to_tree(layers, layouts.gemma_mlp(CONFIG))
    change(tree["layers_1"]["mlp"])
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def replace(**parts):
    return lambda mlp: mlp.update(up_proj=dataclasses.replace(mlp["up_proj"], **parts))


REFUSED = {  # name: (the change, the error)
    "NaN scales": (replace(scale=jnp.full((2, F), jnp.nan)), r"up_proj in .* must be finite.*128 numbers"),
    "NaN in float8": (
        replace(qvalue=jnp.full((D, F), jnp.nan, "float8_e4m3fn")),
        r"up_proj in .* must be finite.*2048 numbers",
    ),
    "scales of a wrong shape": (replace(scale=jnp.ones((F, 2))), r"scale must be \[groups, out\].*\[64, 2\]"),
    "no scale": (lambda mlp: mlp.update(up_proj={"qvalue": mlp["up_proj"].qvalue}), "no such tensor"),
    "an adapter": (lambda mlp: mlp.update(up_proj_lora_a=jnp.ones((D, 2))), "up_proj_lora_a.*adapted"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    change, error = REFUSED[name]
    with pytest.raises(ValueError, match=error):
        checkpoint.read_orbax(saved(tmp_path / "c", quantised(), change), CONFIG)


def test_what_is_not_written(tmp_path):
    layers = quantised()
    bad = dataclasses.replace(layers[1].mlp.up_proj, scale=jnp.full((2, F), jnp.inf))
    bad = dataclasses.replace(layers[1], mlp=dataclasses.replace(layers[1].mlp, up_proj=bad))
    with pytest.raises(ValueError, match="up_proj of layer 1 must be finite"):
        checkpoint.write_orbax(tmp_path / "c", [layers[0], bad], layouts.gemma_mlp(CONFIG))
    with pytest.raises(ValueError, match="must be a dense weight"):
        checkpoint.write_orbax(tmp_path / "c", layers, layouts.tunix(CONFIG))
    with pytest.raises(ValueError, match="must be a dense weight"):
        checkpoint.write_huggingface(tmp_path / "c", layers, CONFIG)
    with pytest.raises(ValueError, match="without an adapter"):
        checkpoint.write_huggingface(tmp_path / "c", add_lora(layers, LoRA(rank=1), jax.random.key(0)), CONFIG)
    assert not list(tmp_path.iterdir())


def adapters():
    """Gate and up share lora_a, as DeepMind's do."""
    layers = add_lora(quantised(), LoRA(rank=2), jax.random.key(0))
    found = layouts.extract_adapters(layers)
    for of_layer in found.values():
        of_layer["up_proj"] = of_layer["up_proj"]._replace(lora_a=of_layer["gate_proj"].lora_a)
    return found


def test_adapters_in_deepminds_tree(tmp_path):
    checkpoint.write_orbax_adapters(tmp_path / "c", adapters())
    equal(checkpoint.read_orbax_adapters(tmp_path / "c"), adapters())
    with pytest.raises(ValueError, match="must be written to a new folder"):
        checkpoint.write_orbax_adapters(tmp_path / "c", adapters())


def test_adapters_of_a_train_state(tmp_path):
    """The moments of an optimizer have the same names below another key."""
    tree = layouts.adapters_to_deepmind(adapters())
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": tree, "opt_state": [{"mu": jax.tree.map(jnp.zeros_like, tree)}]})
    equal(checkpoint.read_orbax_adapters(tmp_path / "c"), adapters())


def test_adapters_that_are_not_finite(tmp_path):
    bad = adapters()
    bad[1]["down_proj"] = bad[1]["down_proj"]._replace(lora_b=jnp.full((2, D), jnp.nan))
    with pytest.raises(ValueError, match="layer_1/mlp/_LoRAEinsum_linear/lora/b must be finite"):
        checkpoint.write_orbax_adapters(tmp_path / "c", bad)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", layouts.adapters_to_deepmind(bad))
    with pytest.raises(ValueError, match=r"layer_1/mlp/_LoRAEinsum_linear/lora/b in .* must be finite"):
        checkpoint.read_orbax_adapters(tmp_path / "c")
