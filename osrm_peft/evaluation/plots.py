"""Plots: score against λ, interference, drift; as PNG files, and as SVG that is drawn in the colours of a page."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from osrm_peft.evaluation.interference import Interference
from osrm_peft.evaluation.tables import AVERAGE, MultiTaskTable, interference_title
from osrm_peft.io.places import new_file
from osrm_peft.merging.overlap import Overlap, mean_overlap

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

_INK = "#010203"  # stands for the page's colour of text in an SVG
_LINES = ("#3a86d4", "#e0762f", "#2f9e62", "#c2529b", "#8a6fd1", "#b8862b", "#d6515b", "#6f8796")  # on white and black
_PAGE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "osrm_peft", "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "grid.color": _INK,
}  # fmt: skip
_STYLE = (
    "<style>:root{color:#1c2128}@media(prefers-color-scheme:dark){:root{color:#e3e6ea}}"
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif!important}</style>"
)


@dataclass(frozen=True)
class Point:
    """A score at one λ.

    Attributes:
        scale: λ.
        value: in percent.
        low, high: how far it may be off; the value itself where that is not known.
        dropped: of a candidate on fewer rows.
    """

    scale: float
    value: float
    low: float
    high: float
    dropped: bool = False


def svg(draw: Callable[[], "Figure"]) -> str:
    """The SVG of a figure, to be shown as an image: transparent, its text in the reader's font, light or dark."""
    from cycler import cycler
    from matplotlib import rc_context

    with rc_context({**_PAGE, "axes.prop_cycle": cycler(color=_LINES)}):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace(_INK, "currentColor")
    text = re.sub(r"<!DOCTYPE.*?>|<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    return re.sub(r"(<svg [^>]*>)", lambda found: found[1] + _STYLE, text, count=1)


def plot_scales(table: MultiTaskTable, path: str | Path) -> None:
    """Plot the average over tasks against λ, a panel a merge method, a line a kind of adapter; write a PNG."""
    curves: dict[str, dict[str, list[Point]]] = {method: {} for method in table.swept()}
    for row in table.rows:
        if row["method"] in curves and row["scale"] is not None:
            value, spread = row["scores"][AVERAGE], row["spread"][AVERAGE] or 0
            line = curves[row["method"]].setdefault(row["init"], [])
            line.append(Point(row["scale"], value, value - spread, value + spread))
    figure = draw_scales(curves, columns=len(curves))
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def draw_scales(curves: Mapping[str, Mapping[str, Sequence[Point]]], columns: int = 3) -> "Figure":
    """The average over tasks against λ: {panel: {line: its points}}; hollow where a candidate had dropped out."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = max(1, min(columns, len(curves)))
    height = -(-len(curves) // columns) or 1
    figure = Figure(figsize=(3.6 * columns, 3.2 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    every = [point for lines in curves.values() for points in lines.values() for point in points]
    limits = (min(point.low for point in every) - 2, max(point.high for point in every) + 2) if every else None
    for panel, (title, lines) in zip(panels, curves.items(), strict=False):
        for name, points in lines.items():
            ordered, color = sorted(points, key=lambda point: point.scale), f"C{names.index(name)}"
            x, y = [point.scale for point in ordered], [point.value for point in ordered]
            off = [[max(0.0, point.value - point.low) for point in ordered],
                   [max(0.0, point.high - point.value) for point in ordered]]  # fmt: skip
            panel.errorbar(x, y, off, color=color, capsize=2, elinewidth=0.8)
            for point in ordered:
                fill = "none" if point.dropped else color
                panel.plot(point.scale, point.value, "o", color=color, markerfacecolor=fill)
        panel.set(title=plot_label(title), xlabel="scale λ", ylim=limits)
        panel.grid(alpha=0.3)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    for panel in panels[::columns]:
        panel.set_ylabel("average over tasks [%]")
    if len(names) > 1:
        keys = [
            Line2D([], [], marker="o", color=f"C{place}", label=plot_label(name)) for place, name in enumerate(names)
        ]
        figure.legend(handles=keys, loc="outside upper center", ncols=min(4, columns * 2))
    return figure


def plot_interference(panels: Mapping[str, Interference], path: str | Path) -> None:
    """Heat maps of who acts on whose features, and of what is shared of A and of B; write a PNG."""
    figure = draw_interference(panels)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png", bbox_inches="tight")


def draw_interference(panels: Mapping[str, Interference]) -> "Figure":
    """Heat maps of {title: Interference}: who acts on whose features, and what pairs share of A and B, as far as known.

    A row is a kind of map, with a panel for each set of adapters; the maps of a single set lie side by side.
    """
    from matplotlib.figure import Figure

    every, alone = list(panels.values()), len(panels) == 1
    kinds = []  # (title, whether it is of features, a matrix for each set)
    if any(found.layers for found in every):
        title = interference_title(next(found for found in every if found.layers))
        means = [100 * found.mean() if found.layers else None for found in every]
        kinds.append((title.replace(", ", "\n") if alone else title, True, means))
    spaces = {"A: inputs": [one.overlap_a for one in every], "B: outputs": [one.overlap_b for one in every]}
    for side, found in spaces.items():
        if any(len(one.tasks) > 1 for one in every) and any(found):
            kinds.append((f"{side} shared, in percent of the smaller space", False, list(map(_shared, found))))
    size = max(2.2, 0.62 * max(len(found.tasks) for found in every))
    high, wide = (1, len(kinds)) if alone else (len(kinds), len(panels))
    names = 0.08 * max(0, max(len(task) for found in every for task in found.tasks) - 12)  # room for long ones
    figure = Figure(figsize=((size + names + 1.6) * wide, (size + names + 1.4) * high), layout="constrained")
    parts = figure.subfigures(high, len(kinds) if alone else 1, squeeze=False).flatten()
    for part, (title, of_features, matrices) in zip(parts, kinds, strict=True):
        part.suptitle(title, fontsize=9)
        _draw_maps(part, panels, matrices, of_features)
    return figure


def _draw_maps(
    part: "SubFigure", panels: Mapping[str, Interference], matrices: Sequence[Tensor | None], of_features: bool
) -> None:
    """Matrices in percent side by side on one scale of colours, logarithmic for features; nothing in place of None."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    positive = [float(x) for one in matrices if one is not None for x in one.flatten() if x > 0] or [1.0]
    low, top = min(positive), max(max(positive), min(positive) * 10)
    norm = LogNorm(low, top) if of_features else Normalize(0, 100)
    scale = ScalarMappable(norm, "viridis" if of_features else "cividis")
    bright = low**0.3 * top**0.7 if of_features else 70.0  # above it a cell is bright
    axes = part.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, found), matrix in zip(axes, panels.items(), matrices, strict=True):
        if matrix is None:
            axis.set_axis_off()
            continue
        shown = matrix.clamp_min(low) if of_features else matrix
        axis.imshow(shown, norm=norm, cmap=scale.get_cmap(), interpolation="none")
        for row, values in enumerate(matrix.tolist()):
            for column, value in enumerate(values):
                if math.isfinite(value):
                    text, color = f"{value:.{2 if value < 99.5 else 3}g}", "black" if value > bright else "white"
                    axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
        names, first = [plot_label(task) for task in found.tasks], axis is axes[0]
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axis.set_yticks(range(len(names)), names if first else [])
        axis.set(title=plot_label(title), xlabel="features of" if of_features else "adapter of")
        axis.set_ylabel("adapter of" if first else "")
    bar = part.colorbar(scale, ax=axes.tolist(), shrink=0.8)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # 256 shapes otherwise


def _shared(layers: Mapping[str, Overlap]) -> Tensor | None:
    """(T, T) percent, nan on the diagonal; None where it is not known."""
    return (100 * mean_overlap(layers.values()).shared).fill_diagonal_(torch.nan) if layers else None


def plot_drift(curves: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> None:
    """Plot OSRM's drift D/‖Ã‖, the mean over layers, against training steps: {adapter: (step, drift)}; write a PNG."""
    figure = draw_drift(curves)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def draw_drift(curves: Mapping[str, Sequence[tuple[float, float]]]) -> "Figure":
    """OSRM's drift D/‖Ã‖, the mean over layers, against training steps: {adapter: (step, drift)}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for adapter, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=plot_label(adapter))
    axes.set(xlabel="training step", ylabel="drift of A, mean over layers", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


def plot_label(name: str) -> str:
    """A name that matplotlib draws literally: no mathematics between $, no omission from legends for a leading _."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")
