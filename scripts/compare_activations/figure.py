"""Figures: one panel for each section of the study."""

from pathlib import Path

from matplotlib.figure import Figure


def draw(path: Path, panels, runs) -> None:
    """Writes a PNG of `panels`. Each is the draw(axes, runs) of a section."""
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for panel, place in zip(panels, axes.flat):
        panel(place, runs)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    figure.savefig(path, dpi=80)
