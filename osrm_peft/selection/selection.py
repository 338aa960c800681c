"""Selection: the ranked table of a choice among merges, how sure it is, and the merge that won."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import HORIZONTALS
from rich.markup import escape
from rich.table import Table

from osrm_peft.evaluation.answer import RULES
from osrm_peft.evaluation.bootstrap import interval
from osrm_peft.evaluation.tables import markdown_table
from osrm_peft.merging.emr_adapter import EMRAdapter
from osrm_peft.merging.merged_adapter import MergedAdapter


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval over rows; without an interval where a score is not ours to resample."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        """From the number, followed by its resamples."""
        return cls(float(values[0]), *(interval(values) if len(values) > 1 else ()))

    def percent(self) -> str:
        """`"71.3 [68.9, 73.5]"`."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f}"
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: the candidate's name, or `"individual adapters"`, `"base under the heads"`.
        rows: rows of all tasks together that it was scored on.
        scores: {task: the metric}.
        mean: over tasks.
        value: what the rule ranks by.
        kept: the share of the adaptation that it keeps: (mean − base's) / (individual's − base's), on the same rows.
        behind: value minus the winner's, on the same rows; None for the winner and for lines that do not compete.
        candidate: method, scale and the other fields of a merge recipe; None for lines that do not compete.
    """

    name: str
    rows: int
    scores: dict[str, Estimate]
    mean: Estimate
    value: Estimate
    kept: Estimate | None = None
    behind: Estimate | None = None
    candidate: dict[str, Any] | None = None


@dataclass(frozen=True)
class Selection:
    """What `select_merge` found.

    Attributes:
        rule: a name of `RULES`.
        tasks: {task: {"metric", "rows", "test_rows"}}.
        ranked: candidates that give one adapter for all tasks, best first; those on fewer rows, which dropped out
            earlier, last.
        apart: the same of candidates whose result differs by task (EMR).
        individual: the adapters, each on its own task.
        base: the base model under the adapters' heads.
        test: the winner, the best of `apart`, the adapters and the base on rows that had no say in the choice; empty
            where the tasks have too few rows.
        winner: the merge on top of `ranked`.
        best_per_task: the merge on top of `apart`; None without one.
        made: how it was made: inputs, settings, versions, rows that were scored.
    """

    rule: str
    tasks: dict[str, dict[str, Any]]
    ranked: list[Line]
    apart: list[Line]
    individual: Line
    base: Line
    test: list[Line]
    winner: MergedAdapter | None
    best_per_task: EMRAdapter | None
    made: dict[str, Any]

    def verdict(self) -> str:
        """The answer in two or three sentences: which merge, how sure, and what it costs."""
        first = (self.ranked or self.apart)[0]
        text = f"Take {first.name}: {first.mean.percent()} over {len(self.tasks)} tasks"
        if first.kept is not None:
            text += f", {100 * first.kept.value:.0f} % of what the adapters learned"
        text += f" (adapters alone {100 * self.individual.mean.value:.1f})"
        tested = [line for line in self.test if line.name == first.name]
        text += f"; {100 * tested[0].mean.value:.1f} on rows that had no say." if tested else "."
        if first.kept is None:
            text += " The adapters alone are no better than the base model on these rows."
        idle = [task for task in self.tasks if self._gain(task) <= 0]
        if idle and first.kept is not None:
            text += f" On {', '.join(idle)} the adapter alone is no better than the base model."
        rivals = [line for line in (self.ranked or self.apart)[1:] if line.rows == first.rows and line.behind]
        if rivals and rivals[0].behind is not None:
            high, points = rivals[0].behind.high, 0.0 - 100 * rivals[0].behind.value
            sure = high is not None and high < 0
            text += f" The next, {rivals[0].name}, is {points:.1f} behind: " + (
                "more than chance." if sure else "within chance, so either will do."
            )
        text += self._edge(first)
        if self.ranked and self.apart:
            other = self.apart[0]
            text += f" With a mask for each task at serving time {other.name} has {100 * other.mean.value:.1f}."
        return text

    def _gain(self, task: str) -> float:
        """How much better a task's own adapter is than the base model under its head."""
        return self.individual.scores[task].value - self.base.scores[task].value

    def _edge(self, first: Line) -> str:
        """A hint where the winner's λ is the largest or the smallest of its sweep."""
        fields = {**(first.candidate or {}), "scale": None}
        others = [line.candidate for line in self.ranked if line.candidate is not None]
        swept = sorted(one["scale"] for one in others if {**one, "scale": None} == fields and one["scale"] is not None)
        if len(swept) < 2 or first.candidate is None or first.candidate["scale"] not in (swept[0], swept[-1]):
            return ""
        end, more = ("largest", "larger") if first.candidate["scale"] == swept[-1] else ("smallest", "smaller")
        return f" Its λ is the {end} that was tried: try {more} ones."

    def to_dict(self) -> dict[str, Any]:
        """The content of `selection.json`."""
        lines = {name: [asdict(line) for line in getattr(self, name)] for name in ("ranked", "apart", "test")}
        alone = {name: asdict(getattr(self, name)) for name in ("individual", "base")}
        about = {"kind": "selection", "rule": self.rule, "verdict": self.verdict(), "tasks": self.tasks}
        return {**about, **lines, **alone, **self.made}

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """(header, lines) as text: candidates best first, then the lines that do not compete, then the test."""
        header = ["merge", "value" if self.rule != "mean" else "mean", "behind", "kept", *self.tasks, "rows"]
        lines = (*self.ranked, *self.apart, self.individual, self.base)
        return header, [_cells(line, list(self.tasks)) for line in lines]

    def markdown(self) -> str:
        """The page `selection.md`: the verdict, the ranked table, and the test rows."""
        header, lines = self.cells()
        text = f"# Which merge\n\n{self.verdict()}\n\nRanked by {RULES[self.rule]}, in percent, with 95 % bootstrap "
        text += f"intervals over rows.\n\n{markdown_table(header, lines)}\n"
        if self.test:
            tests = [_cells(line, list(self.tasks)) for line in self.test]
            text += "\nOn rows that had no say in the choice:\n\n" + markdown_table(header, tests) + "\n"
        return text

    def terminal(self) -> list[Table]:
        """Tables for `rich` to print."""
        header, lines = self.cells()
        tables = [_table(f"Ranked by {RULES[self.rule]}, in percent", header, lines)]
        if self.test:
            tests = [_cells(line, list(self.tasks)) for line in self.test]
            tables.append(_table("On rows that had no say in the choice", header, tests))
        return tables


def value_of(rule: str, scores: Mapping[str, np.ndarray], individual: Mapping[str, float]) -> np.ndarray:
    """(1 + B,) what the rule ranks by, from {task: (1 + B,) scores} of a merge and the adapters' own scores.

    Raises:
        ValueError: the rule divides by an adapter's score, and that is not above 0; names the task.
    """
    if rule == "mean":
        return np.mean(list(scores.values()), axis=0)
    for task, alone in individual.items():
        if alone <= 0:
            raise ValueError(
                f"the adapter of {task!r} alone scores {alone:.3f}, so no score is relative to it: train it longer, "
                "leave the task out, or choose by rule='mean'"
            )
    shares = [scores[task] / individual[task] for task in scores]
    return np.mean(shares, axis=0) if rule == "relative" else np.min(shares, axis=0)


def kept_of(
    scores: Mapping[str, np.ndarray], individual: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]
) -> Estimate | None:
    """The share of the adaptation that is kept; None where the adapters are no better than the base."""
    merged, alone, bare = (np.mean(list(one.values()), axis=0) for one in (scores, individual, base))
    if alone[0] - bare[0] <= 0.005:
        return None
    return Estimate.of((merged - bare) / np.maximum(alone - bare, 1e-3))


def _cells(line: Line, tasks: Sequence[str]) -> list[str]:
    behind = "" if line.behind is None else line.behind.percent()
    kept = "" if line.kept is None else f"{100 * line.kept.value:.0f} %"
    scores = [f"{100 * line.scores[task].value:.1f}" if task in line.scores else "–" for task in tasks]
    return [line.name, line.value.percent(), behind, kept, *scores, str(line.rows)]


def _table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=HORIZONTALS, show_edge=False, padding=(0, 1, 0, 0))
    for place, name in enumerate(header):
        table.add_column(escape(name.replace("_", "\n")), justify="left" if place == 0 else "right", overflow="fold")
    for cells in lines:
        table.add_row(*map(escape, cells))
    return table
