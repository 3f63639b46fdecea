"""Orbax checkpoints are compared with trees that are written by hand and saved by Orbax alone."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_mlp import checkpoint, layouts
from tests.support.by_hand import (
    CONFIG,
    LAYERS,
    TREES,
    D,
    F,
    arrays,
    deepmind_flat,
    equal,
    flax_nnx,
    huggingface,
    layer_dicts,
    params,
)
from tests.support.vary import slow_except

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.promotes  # Orbax relies on promotion


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, jax.tree.map(jnp.asarray, tree))
    return path


ORBAX = [name for name in TREES if not name.startswith("huggingface")]


@pytest.mark.parametrize("name", slow_except(["deepmind_flat", "maxtext, pairs", "gemma_mlp, stacked"], ORBAX))
def test_reads_what_orbax_saved(tmp_path, name):
    _, by_hand, config = TREES[name]
    other = {"embedder": {"input_embedding": np.zeros((3, D), np.float32)}, "step": np.int32(7)}
    path = save(tmp_path / "c", by_hand(arrays(config)) | other)
    expected = params(layer_dicts(arrays(config), name))
    assert equal(checkpoint.read_orbax(path, config), expected)
    assert equal(checkpoint.read_orbax(str(path), config, layers=[3, 1]), [expected[3], expected[1]])
    cast = checkpoint.read_orbax(path, config, layers=[2, 4], stacked=True, dtype="float32")
    assert equal(cast, layouts.stack(jax.tree.map(lambda leaf: leaf.astype("float32"), [expected[2], expected[4]])))


@pytest.mark.parametrize("name", slow_except(["deepmind_stacked", "maxtext", "tunix"], ORBAX))
def test_writes_what_orbax_restores(tmp_path, name):
    layout, by_hand, config = TREES[name]
    checkpoint.write_orbax(tmp_path / "c", params(arrays(config)), layout)
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(tmp_path / "c").item_metadata.tree
        restored = checkpointer.restore(tmp_path / "c", jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), shapes))
    expected = jax.tree.map(np.asarray, by_hand(arrays(config)))
    if name == "tunix":  # Orbax turns the layers' numbers into strings
        expected = {"layers": {str(number): layer for number, layer in expected["layers"].items()}}
    assert equal(restored, expected)
    with pytest.raises(ValueError, match="must be written to a new folder"):
        checkpoint.write_orbax(tmp_path / "c", params(arrays(config)), layout)


def test_a_tree_below_a_prefix_and_a_layout_by_name(tmp_path):
    path = save(tmp_path / "c", {"params": deepmind_flat(arrays(), True), "opt_state": [np.zeros(3, np.float32)]})
    assert equal(checkpoint.read_orbax(path, CONFIG), params(arrays()))
    layout = layouts.deepmind_flat(CONFIG, "params/transformer/")
    assert equal(checkpoint.read_orbax(path, CONFIG, layout=layout), params(arrays()))
    with pytest.raises(ValueError, match=r"layer_0/mlp/gating_einsum in .* no such tensor"):
        checkpoint.read_orbax(path, CONFIG, layout=layouts.deepmind(CONFIG))


def test_a_step_of_a_manager(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(4, args=ocp.args.StandardSave(jax.tree.map(jnp.asarray, {"params": flax_nnx(arrays())})))
    assert equal(checkpoint.read_orbax(tmp_path / "run" / "4" / "default", CONFIG), params(arrays()))
    with pytest.raises(ValueError, match=r"run must be an Orbax checkpoint.*give the item in a step"):
        checkpoint.read_orbax(tmp_path / "run", CONFIG)


def save_as(path, tree, **options):
    """Saves in one of the forms that Orbax's arrays have on disk."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(jax.tree.map(jnp.asarray, tree)))
    return path


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("use_zarr3", [False, True])
@pytest.mark.parametrize("use_ocdbt", [False, True])
def test_every_form_on_the_disk(tmp_path, use_ocdbt, use_zarr3, stacked):
    tree = {"params": {"a|b %20": deepmind_flat(arrays(), True)}}
    path = save_as(tmp_path / "c d%20|", tree, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    expected = layouts.stack(params(arrays())) if stacked else params(arrays())
    assert equal(checkpoint.read_orbax(path, CONFIG, stacked=stacked), expected)


def test_other_tensors_are_not_read(tmp_path):
    """Other tensors may be broken, because only the chosen layers are read."""
    path = save_as(tmp_path / "c", deepmind_flat(arrays(), True), use_ocdbt=False)
    for file in path.glob("transformer/layer_[!2]/**/*"):
        if file.is_file() and file.name != ".zarray":  # Orbax makes the tree from it
            file.write_bytes(b"")
    assert equal(checkpoint.read_orbax(path, CONFIG, layers=[2]), params(arrays())[2:3])
    with pytest.raises(ValueError, match=r"layer_1/.* must be whole\. \w+: "):
        checkpoint.read_orbax(path, CONFIG, layers=[1, 2])


def broken(change):
    tree = deepmind_flat(arrays(), True)
    change(tree)
    return tree


GATING = "transformer/layer_1/mlp/gating_einsum"
MALFORMED = {
    "missing": (lambda tree: tree.pop(GATING), rf"{GATING}/w in .* must be \[2, 4, 6\] or \[2, 6, 4\].*no such tensor"),
    "misshapen": (
        lambda tree: tree.update({GATING: {"w": np.zeros((2, F, F), "float32")}}),
        r"\w+: float32\[2, 6, 6\]",
    ),
    "surplus": (lambda tree: tree[GATING].update(b=np.zeros(F, "float32")), rf"\w+: {GATING}/b"),
    "float16": (
        lambda tree: tree.update({GATING: {"w": np.zeros((2, F, D), "float16")}}),
        r"\w+: float16\[2, 6, 4\]",
    ),
    "not finite": (
        lambda tree: tree.update({GATING: {"w": np.full((2, F, D), np.inf, ml_dtypes.bfloat16)}}),
        f"{GATING}/w in .* must be finite",
    ),
    "of another library": (
        lambda tree: (tree.clear(), tree.update(w=np.zeros(3, "float32"))),
        "none fits; names such as w",
    ),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(tmp_path, name, stacked):
    change, message = MALFORMED[name]
    with pytest.raises(ValueError, match=message):
        checkpoint.read_orbax(save(tmp_path / "c", broken(change)), CONFIG, stacked=stacked)


def test_data_cut_short(tmp_path):
    """In a process of its own, because Orbax's background reads would raise their errors in a later test.

    Our error is read from stdout, because those reads write theirs into the middle of stderr.
    """
    path = save(tmp_path / "c", deepmind_flat(arrays(), True))
    for file in path.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    code = f"""
from gemma_mlp import MLPConfig, checkpoint
try:
    checkpoint.read_orbax({str(path)!r}, MLPConfig({D}, {F}))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert re.search(r"(must be whole|must be an Orbax checkpoint)\. \w+: \w", done.stdout)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="must be an Orbax checkpoint"):
        checkpoint.read_orbax(tmp_path / "absent", CONFIG)


def test_layers_out_of_range(tmp_path):
    path = save(tmp_path / "c", deepmind_flat(arrays(), True))
    with pytest.raises(ValueError, match=f"layers 0 to {LAYERS - 1}"):
        checkpoint.read_orbax(path, CONFIG, layers=[LAYERS])


def test_hugging_face_names_in_orbax(tmp_path):
    path = save(tmp_path / "c", huggingface(arrays()))
    assert equal(checkpoint.read_orbax(path, CONFIG), params(arrays()))
