"""Draws the benchmark: times relative to the bare matmuls, and memory by compiler."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmark import timing


def draw(path: Path, report: dict) -> bool:
    """Draws one panel for each dtype and pass that was timed, and one for the memory of the scanned stack.

    Returns whether the report has any of these.
    """
    panels = sorted({(row["dtype"], row["pass"]) for row in report.get("time", [])})
    memory = [row for row in report.get("memory", []) if row["stack"] == "scanned"]
    count = len(panels) + bool(memory)
    if count == 0:
        return False
    figure = Figure(figsize=(5 * count, 4.5), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)
    for (dtype, which), panel in zip(panels, axes[0]):
        rows = [row for row in report["time"] if (row["dtype"], row["pass"]) == (dtype, which)]
        for name in timing.CONTESTANTS:
            points = sorted((row["tokens"], row[name] / row["matmuls"]) for row in rows if name in row)
            if points:
                panel.plot(*zip(*points), marker="o", label=name)
        panel.axhline(1, color="gray", linestyle="--", label="bare matmuls")
        panel.set(
            title=f"{which}, {dtype}", xlabel="tokens", ylabel="time / bare matmuls", xscale="log", ylim=(0, None)
        )
        panel.legend()
    if memory:
        panel = axes[0][-1]
        columns = [name for name in memory[0] if name not in ("stack", "layer", "chunk_size")]
        for i, row in enumerate(memory):
            label = row["layer"] + (", chunked" if row["chunk_size"] else "")
            places = [place + i / (len(memory) + 1) for place in range(len(columns))]
            panel.bar(
                places, [row.get(name) or 0 for name in columns], 1 / (len(memory) + 1), label=label, align="edge"
            )
        panel.set_xticks([place + 0.4 for place in range(len(columns))], columns, rotation=20)
        panel.set(title="gradient of a scanned stack", xlabel="compiler", ylabel="temporary memory, MiB")
        panel.legend()
    figure.savefig(path, dpi=110)
    return True
