"""Compiles one case and reports its memory, its transfers by kind and mesh axes, its FLOPs and a roofline estimate."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from meshes import AXES

from gemma_mlp import aot
from plan.chips import Chip
from plan.stack import LAYERS, Case, build


def attempt(case: Case, chip: Chip, target: str) -> dict[str, Any]:
    """Compiles `case` for `target`, a target of :func:`gemma_mlp.aot.compile_for`, and returns a row for plan.json.

    Bytes, FLOPs and seconds are per chip and per run. If the compiler refuses a case because it does not fit, its row
    ends with `fits` (False) and `needed_bytes`.

    Raises:
      ValueError: if the mesh does not divide the sizes.
    """
    row = {"mesh": dict(zip(AXES, case.mesh)), "sequence_parallel": case.sequence_parallel, "save": case.save}
    row |= {"case": str(case), "layers": LAYERS[case.preset], "tokens": case.all_tokens}
    mesh = Mesh(np.array(aot.devices(target)[: np.prod(case.mesh)]).reshape(case.mesh), AXES)
    function, arguments, donated = build(case, mesh)
    try:
        with jax.set_mesh(mesh):
            compiled = aot.compile_for(target, function, *arguments, donate_argnums=donated)
    except aot.DoesNotFit as error:
        return row | {"fits": False, "needed_bytes": error.needed_bytes}
    bytes_of = {
        "arguments": compiled.argument_bytes,
        "results": compiled.output_bytes - compiled.alias_bytes,
        "temporary": compiled.temp_bytes,
        "total": compiled.total_bytes,
    }
    row |= {"bytes": bytes_of, "needed_bytes": compiled.total_bytes, "fits": compiled.total_bytes <= chip.hbm_bytes}
    moved = compiled.argument_bytes + compiled.output_bytes
    seconds = {
        "FLOPs": case.flops() / chip.flops,
        "HBM": moved / chip.hbm_speed,
        "links": sum(
            each.sent_bytes * (each.times or 1) / chip.speed_within(each.groups) for each in compiled.collectives
        ),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return row | {
        "transfers": transfers(compiled.collectives, case.mesh),
        "flops": case.flops(),
        "roofline_seconds": seconds,
        "bound": bound,
        "roofline_tokens_per_second": case.all_tokens / seconds[bound],
    }


def transfers(collectives: Iterable[aot.Collective], mesh: tuple[int, ...]) -> list[dict[str, Any]]:
    """The transfers of one run, summed by kind and mesh axes; the largest come first.

    If one of them is in a loop that runs an unknown number of times, it counts once, and the sum is marked `at_least`.
    """
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for each in collectives:
        axes, times = axes_of(each.groups, mesh), each.times or 1
        row = {"kind": each.kind, "axes": axes, "runs": 0, "result_bytes": 0, "sent_bytes": 0, "at_least": False}
        row = sums.setdefault((each.kind, axes), row)
        row["runs"] += times
        row["result_bytes"] += times * each.bytes
        row["sent_bytes"] += times * each.sent_bytes
        row["at_least"] |= each.times is None
    return sorted(sums.values(), key=lambda row: -row["sent_bytes"])


def axes_of(groups: tuple[tuple[int, ...], ...], mesh: tuple[int, ...]) -> str:
    """The names of the mesh axes along which the chips of a group lie. XLA numbers chips in the mesh's order."""
    places = [np.stack(np.unravel_index(group, mesh)) for group in groups]
    differs = np.any([(place != place[:, :1]).any(axis=1) for place in places], axis=0)
    return ", ".join(np.array(AXES)[differs])
