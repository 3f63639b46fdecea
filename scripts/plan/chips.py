"""The published numbers of each chip. Speeds are per chip and second. Links are counted in one direction."""

import math
import re
from dataclasses import dataclass

from gemma_mlp.aot import H200S_PER_HOST
from gemma_mlp.checks import require


@dataclass(frozen=True)
class Chip:
    """One chip, or one of the `devices` that it has in JAX: the other numbers are those of a device.

    Attributes:
      hbm_bytes: the memory that a program may use.
      flops: FLOP/s of dense bfloat16 matmuls.
      hbm_speed: bytes/s of its memory.
      link_speed: bytes/s that it sends over all its links together.
      host: how many chips the links of one host connect. None if the links connect all chips.
      network_speed: bytes/s that a chip sends over the network to other hosts.
      devices: how many devices of JAX a chip is.
    """

    hbm_bytes: float
    flops: float
    hbm_speed: float
    link_speed: float
    host: int | None = None
    network_speed: float = 0
    devices: int = 1

    def speed_within(self, groups: tuple[tuple[int, ...], ...]) -> float:
        """The most bytes/s that a chip can send to the other chips of its group.

        A group within one host uses the links. A group across hosts uses the network cards of its chips in each host.
        """
        if self.host is None:
            return self.link_speed
        hosts = [len({chip // self.host for chip in group}) for group in groups]
        cards = [len(group) / count for group, count in zip(groups, hosts) if count > 1]  # in each host
        return min([self.link_speed, *(self.network_speed * count for count in cards)])


# TPUs: "key specifications" of cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x. The links are half of the
# bidirectional inter-chip bandwidth of 400, 1200, 800 and 1200 GB/s. The chips have 16, 96, 32 and 192 GiB. The errors
# of libtpu 0.0.52 say how much of that a program may use. A 7x is two devices, each with half of the chip's numbers.
# H200: NVIDIA's data sheet has 141 GB, 4.8 TB/s, 1979 TFLOP/s with sparsity (half without), and NVLink of 900 GB/s in
# both directions together. The DGX H200 data sheet has eight network cards of 400 Gbit/s for eight chips.
CHIPS = {
    "v5e": Chip(hbm_bytes=15.75 * 2**30, flops=197e12, hbm_speed=819e9, link_speed=200e9),
    "v5p": Chip(hbm_bytes=95.73 * 2**30, flops=459e12, hbm_speed=2765e9, link_speed=600e9),
    "v6e": Chip(hbm_bytes=31.24 * 2**30, flops=918e12, hbm_speed=1640e9, link_speed=400e9),
    "tpu7x": Chip(hbm_bytes=94.74 * 2**30, flops=1153.5e12, hbm_speed=3690e9, link_speed=300e9, devices=2),
    "h200": Chip(141e9, flops=989.5e12, hbm_speed=4.8e12, link_speed=450e9, host=H200S_PER_HOST, network_speed=50e9),
}


def parse(target: str) -> tuple[Chip, int, str]:
    """Reads a target such as "v5e:16x16" or "h200:8".

    Returns:
      The chip, the number of devices, and the target as :func:`gemma_mlp.aot.compile_for` takes it.
    """
    name, _, shape = target.partition(":")
    require(
        name in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) is not None,
        f"A target must be CHIP:TOPOLOGY, where the chip is one of {', '.join(CHIPS)}.",
        repr(target),
        "use a target like v5e:16x16, v5p:8x8x8, v6e:16x16 or h200:8.",
    )
    count = math.prod(map(int, shape.split("x"))) * CHIPS[name].devices
    return CHIPS[name], count, f"h200:{count}" if name == "h200" else f"tpu {target}"
