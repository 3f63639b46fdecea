"""Figures: one panel for each section of the study."""

from pathlib import Path

from matplotlib.figure import Figure


def draw(path: Path, panels, runs) -> None:
    """Writes a PNG of `panels`. Each is the draw(axes, runs) of a section."""
    compose(panels, runs).savefig(path, dpi=80)


def compose(panels, runs) -> Figure:
    """The figure: rows of at most three panels. The panels of a row share its whole width."""
    rows = [panels[i : i + 3] for i in range(0, len(panels), 3)]
    figure = Figure(figsize=(5.5 * len(rows[0]), 4.5 * len(rows)), layout="constrained")
    for subfigure, row in zip(figure.subfigures(len(rows), 1, squeeze=False).flat, rows):
        for panel, axes in zip(row, subfigure.subplots(1, len(row), squeeze=False).flat):
            panel(axes, runs)
    return figure
