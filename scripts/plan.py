"""Plans a run on accelerators that are not here: memory, transfers, FLOPs and a roofline estimate, by their compilers.

    JAX_PLATFORMS=cpu python scripts/plan.py --config=configs/plan.py:27b --config.target=v5e:16x16 \\
        --config.mesh=data=1,fsdp=16,tensor=16
    JAX_PLATFORMS=cpu python scripts/plan.py --config=configs/plan.py:27b --config.target=v6e:16x16 --search

Compiles the MLP blocks of all layers, the forward pass or a training step with AdamW, with the `aot` extra. `--search`
tries meshes, rules and save policies and ranks those that fit. Writes plan.json; ends with 1 where nothing fits.
"""

import functools
import json
from pathlib import Path

import jax
from absl import app, flags, logging
from meshes import parse
from ml_collections import config_flags
from plan import chips
from plan.attempts import attempt
from plan.search import cases, meshes, nothing_fits, ranked, search
from plan.stack import LAYERS, PROGRAMS, SAVES, Case
from tqdm import tqdm

from gemma_mlp.checks import positive_int, require, require_choice

CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(Path(__file__).parents[1] / "configs" / "plan.py:2b"),
    "What to plan; override any field with --config.FIELD=VALUE.",
)
SEARCH = flags.DEFINE_bool("search", False, "Try meshes, rules and save policies, and rank those that fit.")
GIB = 2**30


def main(argv):
    logging.set_verbosity(logging.WARNING)  # JAX tells of much at INFO
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    config = CONFIG.value
    for name, known in {"preset": LAYERS, "program": PROGRAMS, "save": SAVES}.items():
        require_choice(name, config[name], known)
    positive_int("tokens", config.tokens)
    chip, count, target = chips.parse(config.target)
    compile_case = functools.partial(attempt, chip=chip, target=target)
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    what = {"train": "a training step with AdamW", "forward": "the forward pass"}[config.program]
    print(f"{config.preset}, {LAYERS[config.preset]} layers of the MLP block, {what}; {config.target}, {count} chips")
    print(f"A sequence of {config.tokens} tokens for each row of devices; compiled by JAX {jax.__version__}")
    report = config.to_dict() | {"jax": jax.__version__, "rows": []}

    ladders = ladders_of(config, count)
    for row in tqdm(search(ladders, compile_case), total=sum(map(len, ladders)), leave=False):
        report["rows"].append(row)
        (workdir / "plan.json").write_text(json.dumps(report, indent=2))
        if SEARCH.value:
            tqdm.write(summary(row))

    best = ranked(report["rows"])
    if not best:
        print(nothing_fits(report["rows"], config.target, chip.hbm_bytes))
        return 1
    if SEARCH.value:
        print("\nThose that fit, by the roofline's tokens per second, then by memory")
        print("\n".join(f"{place:>3}. {summary(row)}" for place, row in enumerate(best, 1)))
    show(best[0], chip)
    print(f"\nIn {workdir}: plan.json")
    return 0


def ladders_of(config, count):
    """The cases to try, as :func:`search` takes them; without --search one."""
    chosen = [parse(mesh) for mesh in (config.meshes if SEARCH.value else (config.mesh,))]
    for data, fsdp, tensor in chosen:
        rule = f"A mesh of {config.target} has {count} devices."
        require(data * fsdp * tensor == count, rule, f"{data} x {fsdp} x {tensor}", "change the mesh or the target.")
    if not SEARCH.value:
        case = Case(config.preset, config.program, chosen[0], config.tokens, config.save, config.sequence_parallel)
        return [[case]]
    chosen = chosen or meshes(count, config.preset, config.tokens)
    require(bool(chosen), f"The sizes of {config.preset} divide by a mesh.", f"{count} chips", "take another target.")
    return cases(chosen, config.preset, config.program, config.tokens)


def summary(row):
    """One line."""
    if "skipped" in row:
        return f"{row['case']}: {row['skipped']}"
    needed = f"{row['needed_bytes'] / GIB:.2f} GiB"
    if not row["fits"]:
        return f"{row['case']}: does not fit, needs {needed}"
    seconds = row["roofline_seconds"][row["bound"]]
    speed = f"{row['roofline_tokens_per_second']:.3g} tokens/s"
    return f"{row['case']}: {needed}, at least {seconds:.3g} s, at most {speed}, by {row['bound']}"


def show(row, chip):
    """All that is known of a case that fits."""
    print(f"\n{row['case']}, {row['tokens']:,} tokens")
    parts = ", ".join(f"{name} {row['bytes'][name] / GIB:.2f}" for name in ("arguments", "results", "temporary"))
    print(f"GiB in a chip's memory: {row['needed_bytes'] / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} ({parts})")
    print(f"\n{'transfer':<20}{'mesh axes':<20}{'runs':>10}{'GiB of results':>18}{'GiB sent by a chip':>22}")
    for each in row["transfers"]:
        least = "  at least: how often a loop runs is not known" if each["at_least"] else ""
        sizes = f"{each['result_bytes'] / GIB:>18.3f}{each['sent_bytes'] / GIB:>22.3f}"
        print(f"{each['kind']:<20}{each['axes']:<20}{each['runs']:>10,}{sizes}{least}")
    times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in row["roofline_seconds"].items())
    print(f"\nFLOPs of a chip's products, by arithmetic: {row['flops']:.3e}")
    print(f"Roofline, an estimate and a lower bound, not a measurement: {times}")
    seconds, speed = row["roofline_seconds"][row["bound"]], row["roofline_tokens_per_second"]
    print(f"So at least {seconds:.3g} s, bound by {row['bound']}, and at most {speed:.3g} tokens/s.")


if __name__ == "__main__":
    app.run(main)
