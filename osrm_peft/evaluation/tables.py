"""MultiTaskTable: a table of scores over tasks, for terminal and Markdown."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rich.box import HORIZONTALS
from rich.markup import escape
from rich.table import Table

from osrm_peft.checks import printable
from osrm_peft.evaluation.interference import Interference
from osrm_peft.merging.overlap import mean_overlap

AVERAGE = "average over tasks"


@dataclass(frozen=True)
class Score:
    """The score of one task in one row of the table.

    Attributes:
        init: how the adapters' A was chosen, such as `"plain LoRA"` or `"OSRM"`.
        method: `"individual"` or a merge method.
        scale: λ; None for individual adapters.
        seed: the adapters' seed.
        task: the task's name.
        score: the value of the task's metric.
    """

    init: str
    method: str
    scale: float | None
    seed: int
    task: str
    score: float


@dataclass(frozen=True)
class MultiTaskTable:
    """Scores in percent: rows (init, method, λ) × tasks and their average, mean and spread over seeds.

    Attributes:
        tasks: the columns; their average follows if there are several.
        rows: {"init", "method", "scale", "seeds", "scores": {column: mean}, "spread": {column: sample std or None}}.
    """

    tasks: list[str]
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, scores: Iterable[Score]) -> "MultiTaskTable":
        """Group scores by (init, method, λ), in the order in which these first appear."""
        scores = list(scores)
        tasks = list(dict.fromkeys(score.task for score in scores))
        groups: dict[tuple, dict[int, dict[str, float]]] = {}
        for score in scores:
            key = (score.init, score.method, score.scale)
            groups.setdefault(key, {}).setdefault(score.seed, {})[score.task] = 100 * score.score
        rows = []
        for (init, method, scale), seeds in groups.items():
            complete = [by_task for by_task in seeds.values() if len(by_task) == len(tasks)]
            if not complete:
                continue
            columns = {task: [by_task[task] for by_task in complete] for task in tasks}
            columns[AVERAGE] = [statistics.fmean(by_task.values()) for by_task in complete]
            rows.append(
                {
                    "init": init,
                    "method": method,
                    "scale": scale,
                    "seeds": len(complete),
                    "scores": {column: statistics.fmean(values) for column, values in columns.items()},
                    "spread": {
                        column: statistics.stdev(values) if len(values) > 1 else None
                        for column, values in columns.items()
                    },
                }
            )
        return cls(tasks, rows)

    @property
    def columns(self) -> list[str]:
        """The tasks, and their average where they are several."""
        return [*self.tasks, AVERAGE] if len(self.tasks) > 1 else self.tasks

    def best(self) -> list[list[bool]]:
        """Whether no merge has a higher mean, for each row and column; individual adapters do not compete."""
        merged = [row["scores"] for row in self.rows if row["method"] != "individual"]
        columns = self.columns
        highest = {column: max(scores[column] for scores in merged) for column in columns if merged}
        return [  # equal means of several seeds may differ in their last bit
            [row["method"] != "individual" and row["scores"][one] >= highest[one] - 1e-9 for one in columns]
            for row in self.rows
        ]

    def swept(self) -> list[str]:
        """The merge methods that have scores at more than one λ."""
        scales: dict[str, set[float | None]] = {}
        for row in self.rows:
            scales.setdefault(row["method"], set()).add(row["scale"])
        return [method for method, tried in scales.items() if len(tried) > 1]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """(header, rows) as text, for any kind of table."""
        header = ["adapters", "merge", "λ", *self.columns]
        lines = []
        for row in self.rows:
            cells = [row["init"], row["method"], "" if row["scale"] is None else f"{row['scale']:g}"]
            for column in self.columns:
                spread = row["spread"][column]
                cells.append(f"{row['scores'][column]:.1f}" + ("" if spread is None else f" ± {spread:.1f}"))
            lines.append(cells)
        return header, lines

    def markdown(self) -> str:
        """A Markdown table."""
        return markdown_table(*self.cells(), names=2)

    def terminal(self, title: str) -> Table:
        """A table for `rich` to print, narrow enough for 80 columns; the best merge of each column in bold."""
        table = Table(title=title, title_justify="left", box=HORIZONTALS, show_edge=False, padding=0)
        table.add_column("merge and λ", no_wrap=True)
        for name in self.columns:
            words = ["average"] if name == AVERAGE else name.split("_")
            table.add_column(escape("\n".join(words)), justify="right", min_width=max(map(len, words)))
        _, lines = self.cells()
        init = None
        for row, (_, method, scale, *cells), best in zip(self.rows, lines, self.best(), strict=True):
            if row["init"] != init:
                init = row["init"]
                table.add_section()
                table.add_row(f"[bold]{escape(init)}[/bold]")
            cells = [f"[bold]{cell}[/bold]" if one else cell for cell, one in zip(cells, best, strict=True)]
            table.add_row(escape(f" {method} {scale}"), *cells)
        return table


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """A Markdown table: the first `names` columns are aligned left, the others (numbers) right."""
    rule = ["---"] * names + ["--:"] * (len(header) - names)
    lines = ([cell.replace("|", "\\|") for cell in cells] for cells in [header, rule, *rows])
    return "\n".join("| " + " | ".join(" ".join(printable(cell).split()) for cell in cells) + " |" for cells in lines)


def interference_table(found: Interference) -> Table:
    """T×T shares in percent, for `rich` to print: the row's adapter on the column's features."""
    table = Table(title=interference_title(found), title_justify="left", box=HORIZONTALS, show_edge=False)
    table.add_column("adapter of")
    for task in found.tasks:
        table.add_column(f"on {escape(task)}", justify="right")
    for task, row in zip(found.tasks, found.mean().tolist(), strict=True):
        table.add_row(escape(task), *(f"{100 * share:.3g}" for share in row))
    return table


def overlap_table(found: Interference) -> Table:
    """Pairs of adapters × what they share of A and of B, for `rich` to print: means over layers."""
    title = "Share of A and B in common (largest cosine; share of random spaces), mean over layers"
    table = Table(title=title, title_justify="left", box=HORIZONTALS, show_edge=False)
    table.add_column("adapters of")
    means = {name: mean_overlap(layers.values()) for name, layers in (("A", found.overlap_a), ("B", found.overlap_b))}
    for name in means:
        table.add_column(name, justify="right")
    for (i, one), (j, other) in combinations(enumerate(found.tasks), 2):
        numbers = ([float(values[i, j]) for values in (mean.shared, mean.largest, mean.random)]
                   for mean in means.values())  # fmt: skip
        cells = ("–" if math.isnan(a) else f"{a:.3f} ({b:.2f}; {c:.3f})" for a, b, c in numbers)
        table.add_row(f"{escape(one)}, {escape(other)}", *cells)
    return table


def interference_title(found: Interference) -> str:
    """The title of a table or plot: what the shares are shares of."""
    below = "E‖W₀ h_t‖²" if found.relative_to == "base" else "E‖τ_t h_t‖²"
    return f"E‖τ_j h_t‖² / {below} in percent, geometric mean over layers"
