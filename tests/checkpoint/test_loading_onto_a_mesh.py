"""Checkpoints loaded straight onto a mesh of eight devices, as lists of layers and as stacks."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gemma_mlp import checkpoint, layouts
from gemma_mlp.checkpoint import loading
from tests.support.by_hand import CONFIG, LAYERS, arrays, equal, params
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


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host", "device"])
def test_a_memory_kind(read, kind, stacked):
    wanted = jax.tree.map(lambda s: s.with_memory_kind(kind), shardings(None) if stacked else shardings())
    got = read(shardings=wanted, stacked=stacked)
    expected = layouts.stack(params(arrays())) if stacked else params(arrays())
    for some, same in zip([got] if stacked else got, [expected] if stacked else expected, strict=True):
        check(some, same, wanted, pieces=4)
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(some)} == {kind}


@pytest.mark.parametrize("stacked", [False, True])
def test_each_leaf_has_a_memory_kind_of_its_own(tmp_path, stacked):
    """Weights stay with the host and norms go to the device, on one device of several."""
    folder, device = write(tmp_path, arrays(), shards=3), jax.devices()[3]
    kinds = {name: "pinned_host" if name.endswith("proj") else "device" for name in SPECS}
    wanted = layouts.make_params({name: SingleDeviceSharding(device, memory_kind=kinds[name]) for name in SPECS})
    got = checkpoint.read_huggingface(folder, shardings=wanted, stacked=stacked)
    assert equal(got, layouts.stack(params(arrays())) if stacked else params(arrays()))
    for leaf, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(wanted) * (1 if stacked else LAYERS), strict=True):
        assert leaf.sharding == sharding


def test_a_stack_in_the_hosts_memory_is_never_on_the_device(read, monkeypatch):
    """It may be larger than the device's memory."""
    monkeypatch.setattr(loading, "_new_stack", None)  # makes stacks on devices
    wanted = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), shardings(None))
    check(read(stacked=True, shardings=wanted), layouts.stack(params(arrays())), wanted, pieces=4)


def test_parameters_in_the_hosts_memory_are_written(tmp_path):
    host = SingleDeviceSharding(jax.devices()[1], memory_kind="pinned_host")
    layers = jax.device_put(params(arrays()), host)
    checkpoint.write_huggingface(tmp_path / "a", layers, CONFIG)
    checkpoint.update_huggingface(tmp_path / "a", layers[::-1])
    assert equal(checkpoint.read_huggingface(tmp_path / "a"), params(arrays())[::-1])
    checkpoint.write_orbax(tmp_path / "b", layers, layouts.tunix(CONFIG))
    assert equal(checkpoint.read_orbax(tmp_path / "b", CONFIG), params(arrays()))


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
    for kind in ("device", "pinned_host"):
        wanted = jax.tree.map(lambda sharding, kind=kind: sharding.with_memory_kind(kind), wanted)
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj\.weight in .* finite\. \w+: 2 .* of 24\."):
            checkpoint.read_huggingface(write(tmp_path, broken), stacked=stacked, shardings=wanted)
