"""Plans a run on TPUs or H200s that you do not have. Their compilers, which run on a CPU, report what the run needs.

    JAX_PLATFORMS=cpu python scripts/plan.py --config=configs/plan.py:27b --config.target=v5e:16x16 \\
        --config.mesh=data=1,fsdp=16,tensor=16
    JAX_PLATFORMS=cpu python scripts/plan.py --config=configs/plan.py:27b --config.target=v6e:16x16 --search

The command compiles the MLP blocks of all layers, as a forward pass or as a training step with AdamW. It prints how
much memory each chip needs, what it sends to other chips, its FLOPs, and a roofline estimate of the time. With
--search it tries meshes, sharding rules and save policies, and ranks those that fit. It writes plan.json to
config.workdir, which is runs/plan-27b for 27b, and exits with 1 if nothing fits.

One case takes about ten seconds on two CPU cores. A search over 256 chips has up to 243 cases; --config.meshes limits
it to the meshes that you name. An interrupted search starts over.

It needs the `aot` extra: pip install -e ".[train,aot]". scripts/plan/README.md explains the report and has results.
"""

import functools
import json
from pathlib import Path

import cli
import jax
from absl import flags
from interruption import interruptible
from meshes import parse
from plan import chips
from plan.attempts import attempt
from plan.search import all_meshes, cases, nothing_fits, ranked, search
from plan.stack import LAYERS, PROGRAMS, SAVES, Case
from tqdm import tqdm
from workdir import make_workdir, write_atomically

from gemma_mlp.checks import positive_int, require

CONFIG = cli.config("plan", "It says what to plan.", size="2b")
SEARCH = flags.DEFINE_bool("search", False, "Try meshes, sharding rules and save policies, and rank those that fit.")
GIB = 2**30


def main():
    config = CONFIG.value
    for field, known in {"preset": LAYERS, "program": PROGRAMS, "save": SAVES}.items():
        cli.require_names(field, [config[field]], known)
    positive_int("config.tokens", config.tokens)
    chip, count, target = chips.parse(config.target)
    ladders = ladders_of(config, count)
    workdir = Path(config.workdir)
    make_workdir(workdir)
    what = {"train": "a training step with AdamW", "forward": "the forward pass"}[config.program]
    print(f"{config.preset}, {LAYERS[config.preset]} layers of the MLP block, {what}; {config.target}, {count} chips")
    print(f"data x fsdp sequences of {config.tokens} tokens each; compiled by JAX {jax.__version__}")
    report = config.to_dict() | {"jax": jax.__version__, "rows": []}

    compile_case = functools.partial(attempt, chip=chip, target=target)
    with interruptible(lambda: saved(workdir, report["rows"])):
        for row in tqdm(search(ladders, compile_case), total=sum(map(len, ladders)), leave=False):
            report["rows"].append(row)
            write_atomically(workdir / "plan.json", json.dumps(report, indent=2))
            if SEARCH.value:
                tqdm.write(summary(row))

    best = ranked(report["rows"])
    if not best:
        print(nothing_fits(report["rows"], config.target, chip.hbm_bytes))
        return 1
    if SEARCH.value:
        print("\nWhat fits, ranked by the roofline's tokens per second, then by memory")
        print("\n".join(f"{place:>3}. {summary(row)}" for place, row in enumerate(best, 1)))
    show(best[0], chip)
    print(f"\nWritten to {workdir}: plan.json")
    return 0


def saved(workdir, rows):
    """What an interrupted plan has saved, for people."""
    done = f"{workdir}/plan.json holds {len(rows)} finished cases." if rows else "No case is finished."
    return f"{done} The same command starts over."


def ladders_of(config, count):
    """The lists of cases that :func:`search` takes. Without --search there is only one case."""
    chosen = [parse(str(mesh)) for mesh in (config.meshes if SEARCH.value else (config.mesh,))]
    for data, fsdp, tensor in chosen:
        rule = f"A mesh of {config.target} must have {count} devices."
        require(data * fsdp * tensor == count, rule, f"{data} x {fsdp} x {tensor}", "change the mesh or the target.")
    if not SEARCH.value:
        case = Case(config.preset, config.program, chosen[0], config.tokens, config.save, config.sequence_parallel)
        return [[case]]
    chosen = chosen or all_meshes(count, config.preset, config.tokens)
    require(bool(chosen), f"A mesh must divide the sizes of {config.preset}.", f"{count} chips", "change the target.")
    return cases(chosen, config.preset, config.program, config.tokens)


def summary(row):
    """One line about a row."""
    if "skipped" in row:
        return f"{row['case']}: {row['skipped']}"
    needed = f"{row['needed_bytes'] / GIB:.2f} GiB"
    if not row["fits"]:
        return f"{row['case']}: does not fit, needs {needed}"
    seconds = row["roofline_seconds"][row["bound"]]
    speed = f"{row['roofline_tokens_per_second']:.3g} tokens/s"
    return f"{row['case']}: {needed}, at least {seconds:.3g} s, at most {speed}, bound by {row['bound']}"


def show(row, chip):
    """Prints all that is known about a row that fits."""
    print(f"\n{row['case']}, {row['tokens']:,} tokens")
    sizes = ", ".join(f"{name} {row['bytes'][name] / GIB:.2f}" for name in ("arguments", "results", "temporary"))
    print(f"GiB in a chip's memory: {row['needed_bytes'] / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} ({sizes})")
    print(f"\n{'transfer':<20}{'mesh axes':<20}{'runs':>10}{'GiB of results':>18}{'GiB sent by a chip':>22}")
    for each in row["transfers"]:
        note = "  at least: how often a loop runs is not known" if each["at_least"] else ""
        sizes = f"{each['result_bytes'] / GIB:>18.3f}{each['sent_bytes'] / GIB:>22.3f}"
        print(f"{each['kind']:<20}{each['axes']:<20}{each['runs']:>10,}{sizes}{note}")
    times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in row["roofline_seconds"].items())
    print(f"\nFLOPs of a chip's matmuls, by arithmetic: {row['flops']:.3e}")
    print(f"Roofline, an estimate and a lower bound, not a measurement: {times}")
    seconds, speed = row["roofline_seconds"][row["bound"]], row["roofline_tokens_per_second"]
    print(f"A run takes at least {seconds:.3g} s, bound by {row['bound']}: at most {speed:.3g} tokens/s.")


if __name__ == "__main__":
    cli.run(main)
