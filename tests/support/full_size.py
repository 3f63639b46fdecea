"""Writes layers of full size, or reads them and measures the memory. test_full_size.py runs it in processes of its own.

    full_size.py FOLDER PRESET LAYERS write     # makes the checkpoints
    full_size.py FOLDER PRESET LAYERS WAY       # reads one of them and compares it with what was written

The second command prints two numbers of bytes: the peak memory besides the result, and the largest tensor's size.
"""

import ctypes
import gc
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

from gemma_mlp import PRESETS, MLPBlockParams, MLPParams, RMSNormParams, checkpoint, layouts

folder, name, num_layers, way = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
config = PRESETS[name]
D, F = config.embed_dim, config.hidden_dim


def drawn(number):
    """A layer of random bits that are finite bfloat16 numbers. Its norms are exact as 1 + w."""
    rng = np.random.default_rng(number)

    def weight(*shape):
        bits = rng.integers(0, 2**16, shape, np.uint16)
        bits[(bits & 0x7F80) == 0x7F80] ^= 0x4000  # infinities and NaNs made finite
        return bits.view(ml_dtypes.bfloat16)

    def norm():
        return RMSNormParams((rng.integers(-200, 200, D) / 128).astype(ml_dtypes.bfloat16))

    return MLPBlockParams(norm(), MLPParams(weight(D, F), weight(D, F), weight(F, D)), norm())


def same(got, number):
    expected = drawn(number)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        ours = np.asarray(ours)
        if ours.dtype == np.float32 != theirs.dtype:
            ours = ours.astype(theirs.dtype)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours.view(np.uint16), theirs.view(np.uint16))


def resident(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(read, largest):
    """Returns the result of `read`. Prints the peak memory while it runs, without the memory that the result takes."""
    jax.block_until_ready(read(folder / name, config))  # compiles the programs, which stay in memory
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    result = jax.block_until_ready(read(folder / name, config))
    peak = resident("VmHWM")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    print(peak - resident("VmRSS"), largest)
    return result


def write(path, config, layers):
    path.mkdir(exist_ok=True)
    layers = [jax.tree.map(jax.numpy.asarray, layer) for layer in layers]
    checkpoint.write_huggingface(path / "hf", layers, config)
    checkpoint.write_orbax(path / "deepmind", layers, layouts.deepmind(config, transpose_gating_einsum=True))
    checkpoint.write_orbax(path / "maxtext", layers, layouts.maxtext(config, fused=True, scanned=False))
    with ocp.StandardCheckpointer() as checkpointer:  # Orbax itself writes one chunk for each device
        tree = layouts.to_tree(layers, layouts.deepmind(config, transpose_gating_einsum=True))
        checkpointer.save(path / "one_chunk", tree)


def shardings(*lead):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
    specs = {"gate_proj": ("fsdp", "tensor"), "up_proj": ("fsdp", "tensor"), "down_proj": ("tensor", "fsdp")}
    specs |= {"pre_norm": (), "post_norm": ()}
    return layouts.make_params({leaf: NamedSharding(mesh, jax.P(*lead, *spec)) for leaf, spec in specs.items()})


pair, one = 2 * 2 * D * F, 2 * D * F
WAYS = {  # name: (how, the largest tensor of the checkpoint in bytes)
    "one_device": (lambda path, config: checkpoint.read_huggingface(path / "hf"), one),
    "mesh": (lambda path, config: checkpoint.read_huggingface(path / "hf", shardings=shardings()), one),
    "stacked": (
        lambda path, config: checkpoint.read_huggingface(path / "hf", shardings=shardings(None), stacked=True),
        one,
    ),
    "deepmind_stacked": (
        lambda path, config: checkpoint.read_orbax(path / "deepmind", config, shardings=shardings(None), stacked=True),
        pair,
    ),
    "one_chunk": (lambda path, config: checkpoint.read_orbax(path / "one_chunk", config, shardings=shardings()), pair),
    "one_chunk_stacked_one_device": (
        lambda path, config: checkpoint.read_orbax(path / "one_chunk", config, stacked=True),
        pair,
    ),
    "maxtext_stacked_one_device": (
        lambda path, config: checkpoint.read_orbax(path / "maxtext", config, stacked=True),
        pair,
    ),
}

if way == "write":
    write(folder / name, config, [drawn(number) for number in range(num_layers)])
else:
    read, largest = WAYS[way]
    result = measure(read, largest)
    for number, layer in enumerate(layouts.unstack(result) if isinstance(result, MLPBlockParams) else result):
        same(layer, number)
