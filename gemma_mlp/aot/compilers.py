"""Compiles for accelerators that this machine does not have, and says what their compilers made of it.

TPUs need `libtpu`; the H200 needs `jax-cuda13-plugin` and `jax-cuda13-pjrt` of JAX's own version, and for kernels in
Pallas `nvidia-cuda-nvcc` and `nvidia-nvvm`. All are in the `aot` extra; no chip, driver or CUDA library is needed. Set
JAX_PLATFORMS=cpu before JAX starts, or JAX looks for the chips.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from gemma_mlp.aot.hlo import Collective, collectives
from gemma_mlp.checks import require

# What libtpu asks its host for, so that it does without one; the same for every kind of chip.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process fails on a lock file
}

# A GpuTargetConfig of XLA (xla/stream_executor/device_description.proto), with the figures of NVIDIA's H200 data sheet
# and of compute capability 9.0 (CUDA C++ programming guide, technical specifications).
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 } device_description_str: "NVIDIA H200"
"""
HOST = 8  # H200s of an HGX board, which NVLink joins


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program; bytes are per chip.

    Attributes:
      temp_bytes: what the program needs beyond its arguments and results.
      argument_bytes, output_bytes: of its arguments and results.
      alias_bytes: of those results that take the place of donated arguments.
      flops: of one run, or None where the compiler does not count them. Loops count once.
      collectives: the transfers between chips, in program order, each with how often it runs.
      text: the optimised program, in XLA's HLO.
    """

    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    flops: float | None
    collectives: tuple[Collective, ...]
    text: str

    @property
    def total_bytes(self) -> int:
        """What the program has in memory: arguments, results that take no argument's place, all beyond them."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


def devices(target: str) -> list[Any]:
    """The devices of `target`, as :func:`compile_for` takes it, to make a `jax.sharding.Mesh` of.

    Raises:
      ValueError: if there is no such target.
      ImportError: if its compiler is not installed, not in JAX's version, or did not start.
    """
    if target == "cpu":
        return jax.local_devices(backend="cpu")
    return list(_topology(target).devices)


def compile_for(
    target: str,
    function: Callable,
    *args: Any,
    donate_argnums: tuple[int, ...] = (),
    compiler_options: dict[str, Any] | None = None,
) -> Compiled:
    """Compiles `function` for an accelerator, without one.

    Args:
      target: "tpu v5e:2x2", "tpu v5p:2x2x1", "tpu v6e:16x16" and the like, "h200", "h200:8" and, in hosts of eight,
        "h200:16" and so on, or "cpu" for this machine's.
      function: takes and returns arrays.
      args: arrays or `jax.ShapeDtypeStruct`s, and trees of them. Those without a sharding are for one chip; shardings
        are over meshes of :func:`devices`.
      donate_argnums: the arguments whose memory results may take, as `jax.jit` has them.
      compiler_options: for XLA, such as {"xla_gpu_enable_triton_gemm": False}.

    Raises:
      ValueError: if there is no such target.
      ImportError: if its compiler is not installed, not in JAX's version, or did not start.
    """
    chip = jax.sharding.Mesh([devices(target)[0]], ("chip",))
    one_chip = jax.sharding.NamedSharding(chip, jax.sharding.PartitionSpec())

    def abstract(leaf):
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None else one_chip
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    args = jax.tree.map(abstract, args)
    meshes = [getattr(leaf.sharding, "mesh", None) for leaf in jax.tree.leaves(args)]
    meshes = [mesh for mesh in meshes if isinstance(mesh, jax.sharding.Mesh)]
    # Kernels learn their device from the mesh in force: if there is none yet, that of the arguments.
    alone = meshes and jax.sharding.get_abstract_mesh().empty
    with jax.set_mesh(max(meshes, key=lambda mesh: mesh.size)) if alone else contextlib.nullcontext():
        lowered = jax.jit(function, donate_argnums=donate_argnums).lower(*args)
    compiled = lowered.compile(compiler_options=compiler_options)
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None  # both compilers give both
    assert text is not None
    return Compiled(
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        flops=cost.get("flops") if cost else None,
        collectives=collectives(text),
        text=text,
    )


@functools.cache
def _topology(target: str) -> topologies.TopologyDescription:
    kind, _, name = target.partition(" ")
    if kind == "tpu" and re.fullmatch(r"[a-z0-9]+:\d+(x\d+)*", name):
        _require_package("libtpu")
        for variable, value in TPU_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=name)
        except Exception as error:
            raise ValueError(f"libtpu knows the topology. Received: {target!r}. Fix: {error}") from error
    kind, _, name = target.partition(":")
    count = int(name) if re.fullmatch(r"[1-9]\d*", name) else 1 if target == "h200" else 0
    require(
        kind == "h200" and (0 < count < HOST or count // HOST * HOST == count > 0),
        'A target is "tpu CHIP:TOPOLOGY", such as "tpu v5e:2x2", "tpu v5p:2x2x1" or "tpu v6e:16x16", "h200" or, for '
        f'fewer than {HOST} or whole hosts of {HOST}, "h200:COUNT", or "cpu".',
        repr(target),
        "use one of these forms.",
    )
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        _require_package(package, jax.__version__)
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="h200",
            topology=f"1x{max(1, count // HOST)}x{min(count, HOST)}",  # slices, hosts, chips of a host
            target_config=H200.replace("\n", " "),
        )
    except NotImplementedError as error:
        raise ImportError(
            "jax-cuda13-plugin starts; where it looks for a GPU, it does not without CUDA's libraries. Received: "
            f"{error}. Fix: set JAX_PLATFORMS=cpu before JAX starts."
        ) from error


def _require_package(package: str, version: str | None = None) -> None:
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed. Fix: pip install 'gemma-mlp[aot]'.") from error
    if version is not None and installed != version:
        raise ImportError(f"{package} {installed} does not fit JAX {version}. Fix: pip install {package}=={version}.")
