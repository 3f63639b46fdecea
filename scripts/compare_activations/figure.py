"""The comparison as pictures: one for each section, and all of them in one."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(path: Path, panels, runs) -> None:
    """Writes a PNG of `panels`, each a section's draw(axes, runs)."""
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    size = (5.5 * columns, 4.5 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for panel, place in zip(panels, axes.flat):
        panel(place, runs)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    figure.savefig(path, dpi=80)
    plt.close(figure)
