"""Plots: score against λ, interference, drift."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from osrm_peft.evaluation.interference import Interference
from osrm_peft.evaluation.tables import AVERAGE, MultiTaskTable, interference_title
from osrm_peft.io.places import new_file


def plot_scales(table: MultiTaskTable, path: str | Path) -> None:
    """Plot the average over tasks against λ, a panel a merge method, a line a kind of adapter; write a PNG."""
    pyplot = _pyplot()
    methods = table.swept()
    figure, axes = pyplot.subplots(1, max(1, len(methods)), figsize=(3.6 * max(1, len(methods)), 3.2), squeeze=False)
    for axis, method in zip(axes[0], methods, strict=False):
        for init in dict.fromkeys(row["init"] for row in table.rows):
            rows = [row for row in table.rows if (row["init"], row["method"]) == (init, method)]
            rows.sort(key=lambda row: row["scale"])
            axis.errorbar(
                [row["scale"] for row in rows],
                [row["scores"][AVERAGE] for row in rows],
                [row["spread"][AVERAGE] or 0 for row in rows],
                marker="o",
                capsize=2,
                label=plot_label(init),
            )
        axis.set(title=plot_label(method), xlabel="scale λ", ylim=_limits(table, methods))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("average over tasks [%]")
    axes[0][0].legend()
    figure.tight_layout()
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)


def _limits(table: MultiTaskTable, methods: Sequence[str]) -> tuple[float, float]:
    values = [row["scores"][AVERAGE] for row in table.rows if row["method"] in methods]
    return min(values) - 2, max(values) + 2


def plot_interference(panels: Mapping[str, Interference], path: str | Path) -> None:
    """Heat maps side by side on one logarithmic colour scale: {title: Interference}; write a PNG."""
    from matplotlib.colors import LogNorm

    pyplot = _pyplot()
    means = {title: 100 * found.mean() for title, found in panels.items()}
    positive = [float(value) for mean in means.values() for value in mean.flatten() if value > 0] or [1.0]
    norm = LogNorm(min(positive), max(max(positive), min(positive) * 10))
    size = max(2.2, 0.62 * max(len(found.tasks) for found in panels.values()))
    figure, axes = pyplot.subplots(1, len(panels), figsize=((size + 1.6) * len(panels), size + 1.4), squeeze=False)
    dark = min(positive) ** 0.3 * max(max(positive), min(positive) * 10) ** 0.7  # above it a cell is bright
    for axis, (title, found) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(means[title].clamp_min(min(positive)), norm=norm, cmap="viridis")
        for row, values in enumerate(means[title].tolist()):
            for column, value in enumerate(values):
                color = "black" if value > dark else "white"
                axis.text(column, row, f"{value:.2g}", ha="center", va="center", color=color, fontsize=8)
        names = [plot_label(task) for task in found.tasks]
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axis.set_yticks(range(len(names)), names if axis is axes[0][0] else [])
        axis.set(title=plot_label(title), xlabel="features of", ylabel="adapter of" if axis is axes[0][0] else None)
    figure.suptitle(interference_title(next(iter(panels.values()))), fontsize=9)
    figure.tight_layout()
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png", bbox_inches="tight")
    pyplot.close(figure)


def plot_drift(curves: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> None:
    """Plot OSRM's drift D/‖Ã‖, the mean over layers, against training steps: {adapter: (step, drift)}; write a PNG."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for adapter, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=plot_label(adapter))
    axes.set(xlabel="training step", ylabel="drift of A, mean over layers", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)


def plot_label(name: str) -> str:
    """A name that matplotlib draws literally: no mathematics between $, no omission from legends for a leading _."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _pyplot() -> Any:
    """matplotlib, which is slow to import, set to draw without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
