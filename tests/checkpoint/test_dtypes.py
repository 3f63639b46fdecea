"""Files of every float dtype, read as they are or cast, in every form: a list and a stack, on a device and a mesh."""

import itertools

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemma_mlp import checkpoint, layouts
from tests.support.by_hand import CONFIG, TREES, arrays, equal, layer_dicts, params
from tests.support.huggingface_folder import load, write
from tests.support.vary import vary

pytestmark = [pytest.mark.promotes, pytest.mark.usefixtures("eight_devices")]  # Orbax relies on promotion

FORMS = ["huggingface", "deepmind", "deepmind_stacked", "maxtext", "tunix"]
BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = "bfloat16", "float16", "float32", "float64"


def reader(form, path, layers):
    """Writes layers in a form without our code. Returns (its reader, what it must read before any cast)."""
    if form == "huggingface":
        write(path, layers, shards=3)
        return lambda **options: checkpoint.read_huggingface(path, **options), layers
    _, by_hand, config = TREES[form]
    tree = by_hand(layers)
    if form == "maxtext":  # its 1 + w is stored in the layers' dtype, and comes as w in float32 or wider
        norms = {name: layers[0][name].dtype for name in ("pre_norm", "post_norm")}
        for name, dtype in norms.items():
            norm = tree["decoder"]["layers"][name.replace("_norm", "_ffw_norm")]
            norm["scale"] = norm["scale"].astype(dtype)
            for i, layer in enumerate(layers):
                layer[name] = norm["scale"][:, i].astype(np.promote_types(dtype, np.float32)) - 1
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return lambda **options: checkpoint.read_orbax(path, config, **options), layer_dicts(layers, "huggingface")


def placed(stacked, mesh):
    if not mesh:
        return None
    lead = (None,) if stacked else ()
    wide = {"gate_proj": (None, "t"), "up_proj": (None, "t"), "down_proj": ("t", None), "pre_norm": (), "post_norm": ()}
    mesh = jax.make_mesh((2,), ("t",), devices=jax.devices()[:2])
    return layouts.make_params({k: NamedSharding(mesh, PartitionSpec(*lead, *v)) for k, v in wide.items()})


@vary(
    "form stored asked stacked mesh",
    itertools.product(
        FORMS,
        [BFLOAT16, FLOAT16, FLOAT32, FLOAT64],
        [None, BFLOAT16, FLOAT32, FLOAT64],
        [False, True],
        [False, True],
    ),
    together="stored asked",
)
def test_every_dtype_is_cast_on_request(tmp_path, form, stored, asked, stacked, mesh):
    read, layers = reader(form, tmp_path / "c", arrays(dtype=stored))
    options = {"dtype": asked, "stacked": stacked, "shardings": placed(stacked, mesh)}
    refusal = {(FLOAT16, None): "be cast as it is read.*float16.*dtype=", (FLOAT64, None): "64-bit mode"}
    if asked == FLOAT64 or (stored, asked) in refusal:
        with pytest.raises(ValueError, match=refusal.get((stored, asked), "64-bit mode")):
            read(**options)
        return
    expected = [{k: leaf if asked is None else leaf.astype(asked) for k, leaf in layer.items()} for layer in layers]
    assert equal(read(**options), layouts.stack(params(expected)) if stacked else params(expected))


@vary(
    "form mesh dtypes",
    itertools.product(["huggingface", "deepmind", "tunix"], [False, True], [(BFLOAT16, FLOAT32), (FLOAT32, BFLOAT16)]),
)
def test_a_stack_takes_the_widest_dtype_of_its_layers(tmp_path, form, mesh, dtypes):
    """Leaf by leaf: here the norms of all layers are bfloat16, and stay so."""
    layers = arrays(dtype=FLOAT32)
    for i, layer in enumerate(layers):
        for name in layer:
            layer[name] = layer[name].astype(BFLOAT16 if name.endswith("norm") else dtypes[i % 2])
    read, _ = reader(form, tmp_path / "c", layers)
    assert equal(read(), params(layers))
    stack = read(stacked=True, shardings=placed(True, mesh))
    wide = [{k: leaf if k.endswith("norm") else leaf.astype(FLOAT32) for k, leaf in layer.items()} for layer in layers]
    assert equal(stack, layouts.stack(params(wide)))
    narrow = read(stacked=True, layers=[dtypes.index(BFLOAT16)])
    assert narrow.mlp.gate_proj.dtype == ml_dtypes.bfloat16  # the other layers' dtypes do not count


@pytest.mark.parametrize("stacked", [False, True])
def test_a_norm_that_is_stored_as_1_plus_w_comes_as_w_in_float32(tmp_path, stacked):
    """The block adds 1 in float32 again, and a training step changes w by less than bfloat16 holds."""
    read, layers = reader("maxtext", tmp_path / "c", arrays(dtype=BFLOAT16))
    got = read(stacked=stacked)
    assert equal(got, layouts.stack(params(layers)) if stacked else params(layers))
    assert layers[0]["pre_norm"].dtype == FLOAT32
    shapes = checkpoint.orbax_shapes(tmp_path / "c", CONFIG)
    assert {leaf.dtype.name for layer in shapes for leaf in (layer.pre_norm.scale, layer.post_norm.scale)} == {FLOAT32}


def test_shapes_are_those_of_what_is_read(tmp_path):
    for form in FORMS:
        read, _ = reader(form, tmp_path / form, arrays(dtype=FLOAT16))
        path = tmp_path / form
        if form == "huggingface":
            shapes = lambda **options: checkpoint.huggingface_shapes(path, **options)  # noqa: E731
        else:
            shapes = lambda **options: checkpoint.orbax_shapes(path, CONFIG, **options)  # noqa: E731
        assert jax.tree.map(jax.typeof, read(dtype=BFLOAT16)) == jax.tree.map(
            lambda leaf: jax.typeof(np.zeros(leaf.shape, leaf.dtype)), shapes(dtype=BFLOAT16)
        )
        with pytest.raises(ValueError, match="dtype="):
            shapes()


def test_a_number_that_the_dtype_cannot_hold_is_refused(tmp_path):
    layers = arrays(dtype=FLOAT64)
    layers[2]["up_proj"][1, 1] = 1e300
    read, _ = reader("huggingface", tmp_path / "c", layers)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj.* must be finite.*1 numbers.*a wider dtype"):
        read(dtype=FLOAT32)


def test_a_float16_folder_is_updated_in_float16(tmp_path):
    folder = write(tmp_path / "c", arrays(dtype=FLOAT16))
    layers = checkpoint.read_huggingface(folder, dtype=FLOAT32)[::-1]
    with pytest.raises(ValueError, match=r"must be float16, as in .*cast the parameters"):
        checkpoint.update_huggingface(folder, layers)
    checkpoint.update_huggingface(folder, jax.tree.map(lambda leaf: leaf.astype(FLOAT16), layers))
    assert equal(checkpoint.read_huggingface(folder, dtype=FLOAT32), layers)
    assert {str(tensor.dtype) for name, tensor in load(folder).items() if ".mlp." in name} == {FLOAT16}
