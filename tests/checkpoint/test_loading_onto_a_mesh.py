"""Checkpoints loaded straight onto a mesh of eight devices, as lists of layers and as stacks."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_mlp import checkpoint, layouts
from tests.support.by_hand import CONFIG, arrays, equal, params
from tests.support.huggingface_folder import write

pytestmark = [pytest.mark.promotes, pytest.mark.usefixtures("eight_devices")]  # Orbax relies on promotion

SPECS = {
    "gate_proj": ("fsdp", "tensor"),
    "up_proj": ("fsdp", None),
    "down_proj": ("tensor", "fsdp"),
    "pre_norm": ("fsdp",),
    "post_norm": (),
}
ORBAX = {  # the layouts of the Orbax checkpoints
    "deepmind": layouts.deepmind(CONFIG, transpose_gating_einsum=True),
    "deepmind_stacked": layouts.deepmind_stacked(CONFIG, attention_types=2, transpose_gating_einsum=False),
    "maxtext": layouts.maxtext(CONFIG),
    "tunix": layouts.tunix(CONFIG),
}


@pytest.fixture(params=["huggingface", *ORBAX])
def read(request, tmp_path):
    """Reads a checkpoint of `arrays()` in one of the forms."""
    if request.param == "huggingface":
        folder = write(tmp_path / "c", arrays(), shards=3)
        return lambda **options: checkpoint.read_huggingface(folder, **options)
    checkpoint.write_orbax(tmp_path / "c", params(arrays()), ORBAX[request.param])
    return lambda **options: checkpoint.read_orbax(tmp_path / "c", CONFIG, dtype="bfloat16", **options)


def on_mesh(*spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(*lead):
    return layouts.make_params({name: on_mesh(*lead, *spec) for name, spec in SPECS.items()})


def check(got, expected, wanted, pieces):
    assert equal(got, expected)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, got, wanted))
    assert got.mlp.gate_proj.addressable_shards[0].data.size == got.mlp.gate_proj.size // pieces


def test_a_list_of_layers(read):
    for got, expected in zip(read(shardings=shardings()), params(arrays()), strict=True):
        check(got, expected, shardings(), pieces=4)


@pytest.mark.parametrize(("layer_axis", "pieces"), [(None, 4), ("data", 8)], ids=["", "spread over layers too"])
def test_a_stack(read, layer_axis, pieces):
    got = read(layers=range(1, 5), stacked=True, shardings=shardings(layer_axis))
    check(got, layouts.stack(params(arrays())[1:]), shardings(layer_axis), pieces)


WRONG = {
    "a name": (lambda: layouts.make_params(dict.fromkeys(SPECS, "data")), "A sharding must be a NamedSharding"),
    "one that does not divide": (
        lambda: layouts.make_params(dict.fromkeys(SPECS, on_mesh(("data", "fsdp", "tensor")))),
        "partitioned 8 times",
    ),
    "one for all leaves": (on_mesh, "shardings must be a device"),
    "none for the post-norm": (
        lambda: layouts.make_params({name: on_mesh() for name in SPECS if name != "post_norm"}),
        "with one sharding for",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_shardings_that_cannot_be_had_are_refused(tmp_path, name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        checkpoint.read_huggingface(write(tmp_path, arrays(), shards=3), shardings=make())


@pytest.mark.parametrize("stacked", [False, True])
def test_numbers_that_are_not_finite_are_counted_once(tmp_path, stacked):
    broken = arrays()
    broken[1]["gate_proj"][[0, 3], [1, 5]] = np.nan  # in two parts; two devices hold each of them
    wanted = shardings(None) if stacked else shardings()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj\.weight in .* must be finite\. \w+: 2 .* of 24\."):
        checkpoint.read_huggingface(write(tmp_path, broken), stacked=stacked, shardings=wanted)
