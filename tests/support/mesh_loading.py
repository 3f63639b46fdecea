"""Run by test_mesh.py in a process of its own, which has eight CPU devices."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_mlp import checkpoint, layouts
from gemma_mlp.layouts import trees
from tests.checkpoint.test_huggingface import write
from tests.support.by_hand import CONFIG, arrays, equal, params

folder = Path(sys.argv[1])
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
SPECS = {
    "gate_proj": ("fsdp", "tensor"),
    "up_proj": ("fsdp", None),
    "down_proj": ("tensor", "fsdp"),
    "pre_norm": ("fsdp",),
    "post_norm": (),
}


def shardings(*lead):
    return trees.make_params({name: NamedSharding(mesh, PartitionSpec(*lead, *spec)) for name, spec in SPECS.items()})


def check(got, expected, wanted):
    assert equal(got, expected)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, got, wanted))
    assert got.mlp.gate_proj.addressable_shards[0].data.size == got.mlp.gate_proj.size // (4 if lead == () else 8)


write(folder / "hf", arrays(), shards=3)
for layout in (
    layouts.deepmind(CONFIG, transpose_gating_einsum=True),
    layouts.deepmind_stacked(CONFIG, attention_types=2, transpose_gating_einsum=False),
    layouts.maxtext(CONFIG),
    layouts.tunix(CONFIG),
):
    checkpoint.write_orbax(folder / str(id(layout)), params(arrays()), layout)
paths = [path for path in folder.iterdir() if path.name != "hf"]


def read(path, **options):
    if path.name == "hf":
        return checkpoint.read_huggingface(path, **options)
    return checkpoint.read_orbax(path, CONFIG, dtype="bfloat16", **options)


for path in (folder / "hf", *paths):
    lead = ()
    for got, expected in zip(read(path, shardings=shardings()), params(arrays()), strict=True):
        check(got, expected, shardings())
    got = read(path, layers=range(1, 5), stacked=True, shardings=shardings(None))
    check(got, layouts.stack(params(arrays())[1:]), shardings(None))
    lead = ("data",)  # a stack spread over layers too
    got = read(path, layers=range(1, 5), stacked=True, shardings=shardings("data"))
    check(got, layouts.stack(params(arrays())[1:]), shardings("data"))


def everywhere(spec):
    return trees.make_params(dict.fromkeys(SPECS, NamedSharding(mesh, PartitionSpec(*spec))))


for bad, message in (
    (trees.make_params(dict.fromkeys(SPECS, "data")), "A sharding is a NamedSharding"),
    (everywhere([("data", "fsdp", "tensor")]), "partitioned 8 times"),
    (NamedSharding(mesh, PartitionSpec()), "Shardings are a device"),
    (trees.make_params({name: everywhere([]).pre_norm.scale for name in SPECS if name != "post_norm"}), "with one for"),
):
    with pytest.raises(ValueError, match=message):
        read(folder / "hf", shardings=bad)
(folder / "broken").mkdir()
broken = arrays()
broken[1]["gate_proj"][[0, 3], [1, 5]] = np.nan  # in different parts, each of which two devices hold
for options in ({"shardings": shardings()}, {"shardings": shardings(None), "stacked": True}):
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj\.weight in .* finite\. Received: 2 .* of 24\."):
        read(write(folder / "broken" / "hf", broken), **options)
print("ok")
