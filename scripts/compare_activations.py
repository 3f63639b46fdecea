"""Does the gate of GeGLU help, does its smoothness? Held-out loss, gradient flow, fit, curvature, GELU's two forms.

    python scripts/compare_activations.py                                     # the README's figures, 26 CPU minutes
    python scripts/compare_activations.py --config=configs/compare_activations.py:smoke  # too small to tell
    python scripts/compare_activations.py --config.data=FILE_OR_FOLDER --config.workdir=runs/mine

Interrupt it at any time; the same command goes on after the last finished run, to the same tables. Seeds train side by
side in one program, divided over the devices there are.
"""

import json
from pathlib import Path

import cli
from compare_activations import approximation, curvature, expressiveness, figure, gradient_flow, heldout
from compare_activations.contestants import CONTESTANTS
from compare_activations.ledger import Ledger
from tqdm import tqdm
from train_toy.records import claim_workdir, write_atomically

CONFIG = cli.config("compare_activations", "What to compare.")
SECTIONS = {section.NAME: section for section in (heldout, gradient_flow, expressiveness, curvature, approximation)}


def main():
    config = CONFIG.value
    cli.require_names("sections", config.sections, SECTIONS)
    cli.require_names("contestants", config.contestants, CONTESTANTS)
    cli.require_names("factorial", config.factorial, CONTESTANTS)
    workdir = Path(config.workdir)
    identity = {name: value for name, value in config.to_dict().items() if name not in ("workdir", "sections")}
    claim_workdir(workdir, identity | {"corpus_sha256": heldout.load(config).sha256})
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
    print(f"\nIn {workdir}: runs.jsonl, tables.json, comparison.png and a figure for each section.")


def text(rows):
    """Rows of equal keys under one head; wherever the keys change, another."""
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
