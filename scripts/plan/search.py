"""Lists the meshes, sharding rules and save policies to try, and ranks those that fit."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gemma_mlp import PRESETS
from plan.stack import SAVES, Case


def all_meshes(count: int, preset: str, tokens: int) -> list[tuple[int, int, int]]:
    """All meshes (data, fsdp, tensor) of `count` chips that divide the sizes of `preset`; small tensor axes first."""
    config = PRESETS[preset]
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    divided = ((count // (fsdp * tensor), fsdp, tensor) for tensor in sizes for fsdp in sizes)
    return [
        (data, fsdp, tensor)
        for data, fsdp, tensor in divided
        if data * fsdp * tensor == count
        and config.embed_dim % fsdp == 0
        and config.hidden_dim % tensor == 0
        and tokens % tensor == 0
    ]


def cases(choices: Iterable[tuple[int, int, int]], preset: str, program: str, tokens: int) -> list[list[Case]]:
    """One list of cases for each mesh and sharding rule, in which the policy that saves least comes first.

    Without a tensor axis the two sharding rules are the same, so only one is tried.
    """
    saves = SAVES if program == "train" else ("block",)
    return [
        [Case(preset, program, mesh, tokens, save, sequence_parallel) for save in saves]
        for mesh, sequence_parallel in itertools.product(choices, (True, False))
        if mesh[2] > 1 or not sequence_parallel
    ]


def search(ladders: list[list[Case]], attempt: Callable[[Case], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a row for each case. After a policy that does not fit, those that save more are `skipped`."""
    for ladder in ladders:
        skipped = None
        for case in ladder:
            if skipped is not None:
                yield {"case": str(case), "fits": False, "skipped": f"save={skipped} does not fit already"}
                continue
            row = attempt(case)
            skipped = None if row["fits"] else case.save
            yield row


def ranked(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that fit. More tokens per second (rounded to three digits) come first, then less memory."""
    fitting = (row for row in rows if row["fits"])
    return sorted(fitting, key=lambda row: (-float(f"{row['roofline_tokens_per_second']:.2e}"), row["needed_bytes"]))


def nothing_fits(rows: Iterable[dict[str, Any]], target: str, hbm_bytes: float) -> str:
    """The message for the case that no row fits."""
    least = min((row for row in rows if "needed_bytes" in row), key=lambda row: row["needed_bytes"])
    return (
        f"Nothing fits {target}: a chip has {hbm_bytes / 2**30:.2f} GiB, and the leanest case needs "
        f"{least['needed_bytes'] / 2**30:.2f} GiB, {least['case']}. "
        "Fix: take more chips, chips with more memory, fewer tokens, or a mesh with more fsdp or tensor."
    )
