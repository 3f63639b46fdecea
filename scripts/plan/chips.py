"""The chips' published figures. All speeds are per chip and per second; links count in one direction."""

import math
import re
from dataclasses import dataclass

from gemma_mlp.aot.compilers import HOST
from gemma_mlp.checks import require


@dataclass(frozen=True)
class Chip:
    """hbm_bytes: what a program may use. flops: dense bfloat16. link_speed: all of a chip's links at once."""

    hbm_bytes: float
    flops: float
    hbm_speed: float
    link_speed: float
    host: int | None = None  # chips that the links join; beyond them there is network_speed; None: all
    network_speed: float = 0

    def speed_within(self, groups: tuple[tuple[int, ...], ...]) -> float:
        """The most that a chip can send in these groups: its links or, across hosts, its host's network cards."""
        if self.host is None:
            return self.link_speed
        hosts = [len({chip // self.host for chip in group}) for group in groups]
        crossing = [len(group) / count for group, count in zip(groups, hosts) if count > 1]  # members of a host
        return min([self.link_speed, *(self.network_speed * members for members in crossing)])


# TPUs: cloud.google.com/tpu/docs/v5e, /v5p, /v6e, "key specifications": peak bfloat16, HBM bandwidth and, halved, the
# bidirectional inter-chip interconnect bandwidth of 400, 1200 and 800 GB/s. Of their 16, 96 and 32 GiB of HBM, libtpu
# 0.0.52 gives programs what its RESOURCE_EXHAUSTED errors call available.
# H200: NVIDIA's data sheet: 141 GB, 1979 TFLOP/s with sparsity, which is half of it without, 4.8 TB/s, NVLink of 900
# GB/s, which counts both directions. DGX H200's data sheet: eight 400 Gbit/s network cards for eight chips.
CHIPS = {
    "v5e": Chip(hbm_bytes=15.75 * 2**30, flops=197e12, hbm_speed=819e9, link_speed=200e9),
    "v5p": Chip(hbm_bytes=95.73 * 2**30, flops=459e12, hbm_speed=2765e9, link_speed=600e9),
    "v6e": Chip(hbm_bytes=31.24 * 2**30, flops=918e12, hbm_speed=1640e9, link_speed=400e9),
    "h200": Chip(141e9, flops=989.5e12, hbm_speed=4.8e12, link_speed=450e9, host=HOST, network_speed=50e9),
}


def parse(target: str) -> tuple[Chip, int, str]:
    """The chip of a target such as "v5e:16x16" or "h200:8", how many there are, and :mod:`gemma_mlp.aot`'s name."""
    name, _, shape = target.partition(":")
    require(
        name in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) is not None,
        f"A target is a chip, of {', '.join(CHIPS)}, and a topology.",
        repr(target),
        "v5e:16x16, v5p:8x8x8, v6e:16x16 and h200:8 are examples.",
    )
    count = math.prod(map(int, shape.split("x")))
    return CHIPS[name], count, f"h200:{count}" if name == "h200" else f"tpu {target}"
