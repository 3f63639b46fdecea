"""Measures whether the gate and the smoothness of GeGLU help. All feed-forwards have equally many parameters.

    python scripts/compare_activations.py                # the whole study, 26 minutes of CPU time
    python scripts/compare_activations.py --config.data=FILE_OR_FOLDER --config.workdir=runs/mine
    python scripts/compare_activations.py --config.sections="('heldout',)"      # one section alone
    python scripts/compare_activations.py --config=configs/compare_activations.py:smoke   # a minute, too small to tell

The five sections are heldout (loss on text that was not trained on), gradient_flow (gradients through deep stacks),
expressiveness (how well one feed-forward fits given functions), curvature (of the loss, during training) and
approximation (the tanh form of GELU against the erf form).

It prints a table of each section. It writes runs.jsonl, tables.json, a figure of each section, and comparison.png with
all figures to config.workdir, which is runs/compare_activations-default by default. You can interrupt it at any time.
The same command then continues after the last finished run and gives the same tables.

scripts/compare_activations/README.md explains the study and has its results.
"""

import json
from pathlib import Path

import cli
from compare_activations import approximation, curvature, expressiveness, figure, gradient_flow, heldout
from compare_activations.contestants import CONTESTANTS
from compare_activations.ledger import Ledger
from interruption import interruptible
from tqdm import tqdm
from workdir import claim_workdir, read_json_lines, write_atomically

from gemma_mlp import PRESETS

CONFIG = cli.config("compare_activations", "It says what to compare and at what sizes.")
# Each section has a NAME, count(config) of its runs, measure(config, ledger), table(runs) and draw(axes, runs).
SECTIONS = {section.NAME: section for section in (heldout, gradient_flow, expressiveness, curvature, approximation)}
SEEDS = ("seeds", "tuning_seeds", "gradient_flow.seeds", "curvature.seeds")  # may be 0


def main():
    config = CONFIG.value
    cli.require_names("sections", config.sections, SECTIONS)
    cli.require_names("contestants", config.contestants, CONTESTANTS)
    cli.require_names("factorial", config.factorial, CONTESTANTS)
    cli.require_names("approximation.presets", config.approximation.presets, PRESETS)
    cli.require_positive(config.to_dict(), but=SEEDS)
    workdir = Path(config.workdir)
    with interruptible(lambda: saved(workdir)):
        study(config, workdir)


def study(config, workdir):
    identity = {name: value for name, value in config.to_dict().items() if name not in ("workdir", "sections")}
    corpus = heldout.load(config)
    print(f"Text: {corpus.about}.")
    claim_workdir(workdir, identity | {"corpus_sha256": corpus.sha256})
    sections = [SECTIONS[name] for name in config.sections]
    with tqdm(total=sum(section.count(config) for section in sections), unit="run") as bar:
        ledger = Ledger(workdir / "runs.jsonl", bar)
        for section in sections:
            section.measure(config, ledger)
    tables = {section.NAME: section.table(ledger.runs) for section in sections}
    write_atomically(workdir / "tables.json", json.dumps(tables, indent=2))
    for section in sections:
        print(f"\n{section.NAME}\n{text(tables[section.NAME])}")
        figure.draw(workdir / f"{section.NAME}.png", [section.draw], ledger.runs)
    figure.draw(workdir / "comparison.png", [section.draw for section in sections], ledger.runs)
    print(f"\nWritten to {workdir}: runs.jsonl, tables.json, comparison.png and a figure for each section.")


def saved(workdir):
    """What an interrupted study has saved, for people."""
    finished = len(read_json_lines(workdir / "runs.jsonl"))
    return f"{workdir} holds {finished} finished runs. The same command continues after them."


def text(rows):
    """Formats rows as a table, with a new header line wherever the columns change."""
    lines, head = [], []
    for row in rows:
        if not set(row) <= set(head):
            head = max((other for other in rows if set(row) <= set(other)), key=len)
            lines.append("  ".join(f"{name:>12}" for name in head))
        lines.append("  ".join(f"{shown(row.get(name)):>{max(len(name), 12)}}" for name in head))
    return "\n".join(lines)


def shown(cell):
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


if __name__ == "__main__":
    cli.run(main)
