"""Orbax checkpoints are compared with trees that are written by hand and saved by Orbax alone."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state

import gemma_mlp
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
    ours,
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


def manager_with_steps(root, trees, **options):
    """A CheckpointManager's folder with one step for each number in `trees`."""
    with ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(**options)) as manager:
        for step, tree in trees.items():
            manager.save(step, args=ocp.args.StandardSave(jax.tree.map(jnp.asarray, tree)))


@pytest.mark.parametrize("options", [{}, {"step_prefix": "ckpt", "step_format_fixed_length": 4}], ids=str)
def test_the_root_a_step_and_an_item_of_a_manager(tmp_path, options):
    old, new = arrays()[::-1], arrays()
    trees = {9: {"params": flax_nnx(old)}, 10: {"params": flax_nnx(new)}}  # as text, 9 comes after 10
    manager_with_steps(tmp_path / "run", trees, **options)
    (tmp_path / "run" / "notes.txt").write_text("people put files next to steps")
    first, last = ("ckpt_0009", "ckpt_0010") if options else ("9", "10")
    for path, expected in (
        ("run", new),
        (f"run/{last}", new),
        (f"run/{last}/default", new),
        (f"run/{first}", old),
        (f"run/{first}/default", old),
    ):
        assert equal(checkpoint.read_orbax(tmp_path / path, CONFIG), params(expected)), path
    layout = layouts.tunix(CONFIG, "params/")
    assert equal(checkpoint.read_orbax(tmp_path / "run", CONFIG, layout=layout), params(new))
    stack = checkpoint.read_orbax(tmp_path / "run", CONFIG, stacked=True, layers=[1, 2])
    assert equal(stack, layouts.stack(params(new)[1:3]))


def test_a_step_with_several_items(tmp_path):
    """One of them holds the parameters; others hold moments, no arrays, or the same names a second time."""
    tree = jax.tree.map(jnp.asarray, deepmind_flat(arrays(), True))
    items = {"model_1": ocp.args.StandardSave(tree), "opt_state": ocp.args.StandardSave({"mu": tree})}
    items |= {"progress": ocp.args.JsonSave({"epoch": 3})}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, args=ocp.args.Composite(**items))
        manager.save(2, args=ocp.args.Composite(**items, average=ocp.args.StandardSave(tree)))
    assert equal(checkpoint.read_orbax(tmp_path / "run" / "1", CONFIG), params(arrays()))
    with pytest.raises(ValueError, match=r"'average/transformer/'.*'model_1/transformer/'"):
        checkpoint.read_orbax(tmp_path / "run", CONFIG)
    layout = layouts.deepmind_flat(CONFIG, "model_1/transformer/")
    assert equal(checkpoint.read_orbax(tmp_path / "run", CONFIG, layout=layout), params(arrays()))
    with pytest.raises(ValueError, match=r"must hold parameters\. \w+: only the state of an optimizer, such as mu/"):
        checkpoint.read_orbax(tmp_path / "run" / "1" / "opt_state", CONFIG)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the names of v1's functions are still changing
def test_folders_of_orbax_v1(tmp_path):
    v1 = importlib.import_module("orbax.checkpoint.experimental.v1")
    tree = jax.tree.map(jnp.asarray, {"params": ours(arrays())})
    v1.save_pytree(tmp_path / "a", tree)
    v1.save_checkpointables(tmp_path / "b", {"model": tree, "other": {"step": jnp.zeros(3)}})
    with v1.training.Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save_pytree(3, tree)
    for name in "abc":
        assert equal(checkpoint.read_orbax(tmp_path / name, CONFIG), params(arrays())), name


def adam(tree):
    """What optax.adam keeps of a tree: two moments, which differ from it and from one another."""
    return {
        "0": {
            "count": np.int32(3),
            "mu": jax.tree.map(lambda a: 2 * a, tree),
            "nu": jax.tree.map(lambda a: a * a, tree),
        }
    }


TRAINING = {  # name: the tree that is saved for a tree of parameters
    "train state": lambda tree: {"step": np.int32(3), "params": tree, "opt_state": adam(tree)},
    "NNX, older": lambda tree: {"model": valued(tree), "opt_state": valued(adam(tree)), "step": {"value": np.int32(3)}},
    "moments alone have another name": lambda tree: {"params": tree, "optimizer": adam(tree)},
    "momentum": lambda tree: {"model": tree, "sgd": {"0": {"trace": jax.tree.map(lambda a: 2 * a, tree)}}},
    "T5X": lambda tree: {"target": tree, "state": {"param_states": {"m": tree, "v": tree}}},
    "at the top": lambda tree: tree | {"opt_state": adam(tree)},
    "a trailing value": lambda tree: valued(tree),
}


def valued(tree):
    return jax.tree.map(lambda leaf: {"value": leaf}, tree)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("state", TRAINING)
@pytest.mark.parametrize("name", slow_except(["deepmind_flat", "maxtext, pairs", "tunix"], ORBAX))
def test_states_of_training(tmp_path, name, state, stacked):
    """The parameters are found and the moments, which have the same names, are passed over."""
    _, by_hand, config = TREES[name]
    path = save(tmp_path / "c", TRAINING[state](by_hand(arrays(config))))
    expected = params(layer_dicts(arrays(config), name))
    got = checkpoint.read_orbax(path, config, stacked=stacked)
    assert equal(got, layouts.stack(expected) if stacked else expected)


def test_states_of_flax_and_optax_themselves(tmp_path):
    class Decoder(nnx.Module):
        def __init__(self):
            for i in range(2):
                setattr(self, f"layers_{i}", gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(i)))

    model = Decoder()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    linen_state = train_state.TrainState.create(apply_fn=None, params=pure, tx=optax.adam(1e-3))
    states = [nnx.state(model), nnx.state((model, optimizer)), pure, linen_state]
    states += [{"model": nnx.state(model), "optimizer": nnx.state(optimizer)}]
    expected = layouts.from_tree(pure, layouts.gemma_mlp(CONFIG))
    for i, state in enumerate(states):
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(i) / "c", state)
        assert equal(checkpoint.read_orbax(tmp_path / str(i) / "c", CONFIG), expected), i


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


def nothing(path):
    pass


def an_empty_folder(path):
    path.mkdir()


def a_folder_of_folders(path):
    (path / "a" / "b").mkdir(parents=True)


def a_manager_without_steps(path):
    ocp.CheckpointManager(path).close()


def an_empty_description(path):
    path.mkdir()
    (path / "_METADATA").write_text("")


def a_file(path):
    path.write_text("")


@pytest.mark.parametrize(
    "make", [nothing, an_empty_folder, a_folder_of_folders, a_manager_without_steps, an_empty_description, a_file]
)
def test_no_checkpoint(tmp_path, make):
    make(tmp_path / "c")
    with pytest.raises(
        ValueError, match=r"c must be an Orbax checkpoint\. Got: \w.*\w.*\. Fix: give the folder of an item"
    ):
        checkpoint.read_orbax(tmp_path / "c", CONFIG)


def test_an_error_without_words_is_named(tmp_path, monkeypatch):
    def metadata(self, path):
        raise NotImplementedError

    monkeypatch.setattr(ocp.Checkpointer, "metadata", metadata)
    with pytest.raises(ValueError, match=r"Got: NotImplementedError\(\)\."):
        checkpoint.read_orbax(tmp_path, CONFIG)


def test_a_tree_without_arrays(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": {}})
    with pytest.raises(ValueError, match=r"c must hold parameters\. Got: no array\."):
        checkpoint.read_orbax(tmp_path / "c", CONFIG)


def test_layers_out_of_range(tmp_path):
    path = save(tmp_path / "c", deepmind_flat(arrays(), True))
    with pytest.raises(ValueError, match=f"layers 0 to {LAYERS - 1}"):
        checkpoint.read_orbax(path, CONFIG, layers=[LAYERS])


def test_hugging_face_names_in_orbax(tmp_path):
    path = save(tmp_path / "c", huggingface(arrays()))
    assert equal(checkpoint.read_orbax(path, CONFIG), params(arrays()))
