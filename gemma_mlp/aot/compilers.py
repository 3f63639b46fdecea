"""Runs the compilers of TPUs and of the H200 on a machine that has neither.

The compilers come with the `aot` extra; no chip, driver or CUDA library is needed. Set JAX_PLATFORMS=cpu before JAX
starts, otherwise JAX looks for the chips. This folder's README says which package serves which target.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from gemma_mlp.aot.hlo import Collective, collectives
from gemma_mlp.checks import require

# libtpu asks a TPU host for these values. With them it needs no host; one set serves every kind of chip.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second process fails on a lock file
}

# XLA's GpuTargetConfig (xla/stream_executor/device_description.proto). The numbers come from NVIDIA's H200 data sheet
# and, for compute capability 9.0, from the technical specifications of the CUDA C++ programming guide.
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
H200S_PER_HOST = 8  # the chips of one HGX board, which NVLink connects

# XLA writes "the total memory required for HLO temporaries (17.53G) exceeds available HBM (15.75G)".
NEEDED_MEMORY = re.compile(r"total memory required [^(]*\(([\d.]+)([KMGT]?)\)")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(Exception):  # noqa: N818
    """The compiler refused a program. Each chip must have `needed_bytes` of memory for it, but has less."""

    def __init__(self, needed_bytes: float):
        super().__init__(
            "A program must fit the memory of a chip. "
            f"Got: one that needs {needed_bytes / 2**30:.2f} GiB. Fix: take more chips, larger chips or smaller arrays."
        )
        self.needed_bytes = needed_bytes


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports about one program. All bytes are per chip.

    Attributes:
      temp_bytes: the memory that the program needs in addition to its arguments and results.
      argument_bytes, output_bytes: the sizes of all arguments and of all results.
      alias_bytes: the size of the results that overwrite donated arguments.
      flops: the FLOPs of one run, in which the body of a loop counts once. None if the compiler does not count them.
    """

    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    flops: float | None
    _executable: jax.stages.Compiled = field(repr=False)

    @functools.cached_property
    def text(self) -> str:
        """The optimised program, as HLO text.

        It raises a RuntimeError if this JAX is too old to read the program. JAX 0.10.2 cannot read some for a TPU 7x.
        """
        try:
            text = self._executable.as_text()
        except jax.errors.JaxRuntimeError as error:
            rule = "JAX must be able to read the program that the compiler has made."
            fix = "upgrade JAX together with the compiler; for a TPU 7x take 0.12 or newer."
            raise RuntimeError(f"{rule} Got: JAX {jax.__version__}, and {error}. Fix: {fix}") from error
        assert text is not None
        return text

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """The transfers between chips, in program order. Each one says how often it runs. They are found in `text`."""
        return collectives(self.text)

    @property
    def total_bytes(self) -> int:
        """All memory of the program: arguments, temporaries, and the results that overwrite no argument."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


def devices(target: str) -> list[Any]:
    """The devices of a `target` of :func:`compile_for`, from which you can make a `jax.sharding.Mesh`.

    Raises:
      ValueError: if the target does not exist.
      ImportError: if its compiler is not installed, has another version than JAX needs, or did not start.
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
    """Compiles `function` for an accelerator that this machine does not have.

    Args:
      target: one of
        "tpu CHIP:TOPOLOGY", such as "tpu v5e:2x2", "tpu v5p:2x2x1", "tpu v6e:16x16" or "tpu tpu7x:2x2x1";
        "h200" for one GPU, "h200:4" for several GPUs of one host, "h200:16" for two hosts of eight GPUs each;
        "cpu" for this machine's own CPU.
      function: a function of arrays, which `jax.jit` can trace.
      args: its arguments: arrays, `jax.ShapeDtypeStruct`s, or trees of these. A `ShapeDtypeStruct` may have a sharding
        over a mesh of :func:`devices`. All other leaves are placed on one chip.
      donate_argnums: the arguments that results may overwrite, as in `jax.jit`.
      compiler_options: options for XLA, such as {"xla_gpu_enable_triton_gemm": False}.

    Raises:
      ValueError, ImportError: as :func:`devices`.
      DoesNotFit: if the compiler says that the program needs more memory than a chip has. The TPU compilers say so;
        the GPU's does not, so compare :attr:`Compiled.total_bytes` with the chip's memory.
    """
    chip = jax.sharding.Mesh([devices(target)[0]], ("chip",))
    one_chip = jax.sharding.NamedSharding(chip, jax.sharding.PartitionSpec())

    def abstract(leaf):
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None else one_chip
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    args = jax.tree.map(abstract, args)
    meshes = [getattr(leaf.sharding, "mesh", None) for leaf in jax.tree.leaves(args)]
    meshes = [mesh for mesh in meshes if isinstance(mesh, jax.sharding.Mesh)]
    # The kernels ask the current mesh which device it is, so set one: the arguments' mesh, unless the caller set one.
    no_mesh_is_set = meshes and jax.sharding.get_abstract_mesh().empty
    with jax.set_mesh(max(meshes, key=lambda mesh: mesh.size)) if no_mesh_is_set else contextlib.nullcontext():
        lowered = jax.jit(function, donate_argnums=donate_argnums).lower(*args)
    try:
        compiled = lowered.compile(compiler_options=compiler_options)
    except jax.errors.JaxRuntimeError as error:
        needed = NEEDED_MEMORY.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        raise DoesNotFit(float(needed[1]) * UNITS[needed[2]]) from error
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    return Compiled(
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        flops=cost.get("flops") if cost else None,
        _executable=compiled,
    )


@functools.cache
def _topology(target: str) -> topologies.TopologyDescription:
    if re.fullmatch(r"tpu [a-z0-9]+:\d+(x\d+)*", target):
        return _tpu_topology(target)
    h200 = re.fullmatch(r"h200(?::([1-9]\d*))?", target)
    count = int(h200[1] or 1) if h200 else 0
    require(
        0 < count < H200S_PER_HOST or (count > 0 and count % H200S_PER_HOST == 0),
        'A target must be "tpu CHIP:TOPOLOGY", such as "tpu v5e:2x2", "tpu v5p:2x2x1" or "tpu v6e:16x16", or "h200" '
        f'for one GPU, or "h200:COUNT" for up to {H200S_PER_HOST} GPUs or a multiple of {H200S_PER_HOST}, or "cpu".',
        repr(target),
        "use one of these forms.",
    )
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        _require_package(package, jax.__version__)
    hosts, per_host = max(1, count // H200S_PER_HOST), min(count, H200S_PER_HOST)
    topology = {"topology_name": "h200", "topology": f"1x{hosts}x{per_host}"}
    try:
        return topologies.get_topology_desc(platform="cuda", target_config=H200.replace("\n", " "), **topology)
    except NotImplementedError as error:
        raise ImportError(
            "jax-cuda13-plugin must start. It needs CUDA's libraries if JAX looks for a GPU. "
            f"Got: {error}. Fix: set JAX_PLATFORMS=cpu before JAX starts."
        ) from error


def _tpu_topology(target: str) -> topologies.TopologyDescription:
    _require_package("libtpu")
    for variable, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target.removeprefix("tpu "))
    except Exception as error:
        raise ValueError(f"libtpu must know the topology. Got: {target!r}. Fix: {error}") from error


def _require_package(package: str, version: str | None = None) -> None:
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"{package} must be installed. Fix: pip install 'gemma-mlp[aot]'.") from error
    if version is not None and installed != version:
        rule = f"{package} must have the version of JAX, {version}."
        raise ImportError(f"{rule} Got: {installed}. Fix: pip install {package}=={version}.")
