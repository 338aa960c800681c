"""What was scored, wherever its scores lie: lines of one table where tasks and metrics agree."""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from osrm_peft.checks import integer, number
from osrm_peft.evaluation.tables import AVERAGE, MultiTaskTable
from osrm_peft.hub.privacy import public
from osrm_peft.io.manifest import read_manifest
from osrm_peft.merging.methods import METHODS

Role = Literal["merge", "per_task", "individual", "base", "adapter"]
_RANKINGS: dict[Role, str] = {"merge": "ranked", "per_task": "apart"}  # in selection.json
_REFERENCES: tuple[Role, ...] = ("individual", "base")


@dataclass(frozen=True)
class Measured:
    """A score and how far it may be off.

    Attributes:
        value: of the metric, or a share.
        low, high: the 95 % interval over rows, or value ∓ the sample standard deviation over seeds; None: not known.
        over_seeds: which of the two.
    """

    value: float
    low: float | None = None
    high: float | None = None
    over_seeds: bool = False

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Measured":
        """From {"value", "low", "high"}; the last two may be None."""
        low, high = (None if found.get(name) is None else number(name, found[name]) for name in ("low", "high"))
        return cls(number("value", found["value"]), low, high)

    @property
    def margin(self) -> str:
        """How far it may be off, in percent: `"[68.9, 73.5]"`, `"± 1.4"` or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"± {100 * (self.high - self.value):.1f}" if self.over_seeds else span(self.low, self.high)

    def percent(self) -> str:
        """`"71.3 [68.9, 73.5]"`."""
        return f"{signed(100 * self.value)} {self.margin}".strip()


@dataclass(frozen=True)
class Scored:
    """A line of the table.

    Attributes:
        label: method and options, without λ.
        method: by which lines are filtered.
        scale: λ, or the words "by features"; None: no merge, or not known.
        role: `"merge"`, a merge that needs a mask for each task, all individual adapters or the base under their
            heads, or a single adapter.
        scores: {task: the metric}.
        mean: over tasks.
        metrics: {task: its name}, as far as they are known.
        rows: {task: how many rows}, as far as they are known.
        split: of the rows: `"validation"`, `"test"`, or nothing.
        adapters: which adapters, where one file has merges of several kinds of them.
        source: the name of the file or folder.
        place: the folder, if it is here.
        inputs: {task: the folder that was merged}.
        alone: the mean of the individual adapters, on the same rows as far as that is known.
        value: what the selection's rule ranks by.
        kept: the share of the adaptation that is kept.
        behind: value minus the winner's.
        dropped: a candidate that dropped out on fewer rows.
        winner: of a selection.
    """

    label: str
    method: str
    scale: float | str | None
    role: Role
    scores: dict[str, Measured]
    mean: Measured
    metrics: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    split: str = ""
    adapters: str = ""
    source: str = ""
    place: Path | None = None
    inputs: dict[str, Path] = field(default_factory=dict)
    alone: float | None = None
    value: Measured | None = None
    kept: Measured | None = None
    behind: Measured | None = None
    dropped: bool = False
    winner: bool = False

    @property
    def name(self) -> str:
        """Method, options and λ."""
        if self.scale is None:
            return self.label
        return f"{self.label}, λ {self.scale if isinstance(self.scale, str) else format(self.scale, 'g')}"

    def same_scores(self, other: "Scored") -> bool:
        """Whether both have the same tasks and scores, by the same metrics as far as they are known."""
        return _agree(dict.fromkeys(self.scores) | self.metrics, other) and all(
            abs(one.value - other.scores[task].value) < 1e-12 for task, one in self.scores.items()
        )


@dataclass(frozen=True)
class Choice:
    """What `selection.json` says.

    Attributes:
        rule: what ranked the candidates.
        tasks: {task: {"metric", "rows", "test_rows"}}.
        lines: the candidates, best first, those that need a mask for each task, the adapters, the base.
        test: the best of each kind, the adapters and the base on rows that had no say in the choice.
    """

    rule: str
    tasks: dict[str, dict[str, Any]]
    lines: list[Scored]
    test: list[Scored]

    def of(self, role: Role) -> list[Scored]:
        """The lines of this role."""
        return [line for line in self.lines if line.role == role]

    @property
    def winner(self) -> Scored:
        """The best merge that needs no mask; without such a merge, the best of the others."""
        return (self.of("merge") or self.of("per_task"))[0]


@dataclass(frozen=True)
class Combined:
    """Lines that have the same tasks, by the same metrics.

    Attributes:
        metrics: {task: its name, or None where no file says it}.
        lines: merges, best first.
        references: the individual adapters and the base.
    """

    metrics: dict[str, str | None]
    lines: list[Scored]
    references: list[Scored]

    @property
    def rule(self) -> bool:
        """Whether a selection's rule, not the mean over tasks, orders the lines."""
        return any(line.value is not None and line.value != line.mean for line in self.lines)

    def rows_of(self, task: str) -> list[int]:
        """How many rows of the task lines were scored on: the least and the most, or one number, or nothing."""
        lines = [line for line in (*self.lines, *self.references) if not line.dropped]
        counts = [line.rows[task] for line in lines if task in line.rows]
        return sorted({min(counts), max(counts)}) if counts else []


def of_selection(content: Mapping[str, Any], source: str, places: Mapping[str, Path]) -> Choice:
    """The content of `selection.json`.

    Args:
        places: {role: the winner's folder}, as far as they are here.
    """
    tasks: dict[str, dict[str, Any]] = {
        str(name): {"metric": str(one["metric"]), **{key: integer(key, one[key], 0) for key in ("rows", "test_rows")}}
        for name, one in content["tasks"].items()
    }
    alone, lines = number("mean", content["individual"]["mean"]["value"]), list[Scored]()
    for role, name in _RANKINGS.items():
        most = max((integer("rows", one["rows"], 1) for one in content[name]), default=1)
        for rank, one in enumerate(content[name]):
            line, share = _of_line(one, role, tasks, source), one["rows"] / most
            lines.append(
                replace(
                    line,
                    rows={task: round(share * count) for task, count in line.rows.items()},
                    place=places.get(role) if rank == 0 else None,
                    alone=alone if share == 1 else None,
                    dropped=share < 1,
                    winner=not lines,
                )
            )
    if not lines:
        raise ValueError("it has no candidates")
    lines += [_of_line(content[role], role, tasks, source) for role in _REFERENCES]
    roles = {line.name: line.role for line in lines}
    test = [_of_line(one, roles[_of_line(one, "merge", tasks, source).name], tasks, source) for one in content["test"]]
    counts = {name: one["test_rows"] for name, one in tasks.items()}
    return Choice(str(content["rule"]), tasks, lines, [replace(one, rows=counts, split="test") for one in test])


def _of_line(one: Mapping[str, Any], role: Role, tasks: Mapping[str, Any], source: str) -> Scored:
    candidate, name = one.get("candidate") or {}, str(one["name"])
    scale: float | str | None = None
    if candidate:
        name, scale = name.rpartition(", λ ")[0] or name, candidate.get("scale")
        scale = number("scale", scale) if isinstance(scale, int | float) else "by features"
    kept, behind = (None if one.get(key) is None else Measured.of(one[key]) for key in ("kept", "behind"))
    return Scored(
        name,
        str(candidate.get("method", name)),
        scale,
        role,
        {str(task): Measured.of(found) for task, found in one["scores"].items()},
        Measured.of(one["mean"]),
        {name: about["metric"] for name, about in tasks.items()},
        {name: about["rows"] for name, about in tasks.items()},
        source=source,
        value=Measured.of(one["value"]) if candidate else None,
        kept=kept,
        behind=behind,
    )


def of_table(table: MultiTaskTable, source: str) -> list[Scored]:
    """The rows of a table of a demo or an experiment: mean and spread over seeds."""

    def measured(row: Mapping[str, Any], column: str) -> Measured:
        value, spread = row["scores"][column] / 100, row["spread"][column]
        if spread is None:
            return Measured(value)
        return Measured(value, value - spread / 100, value + spread / 100, over_seeds=True)

    lines = []
    for row in table.rows:
        method, individual = row["method"], row["method"] == "individual"
        role: Role = "individual" if individual else "per_task" if _per_task(method) else "merge"
        scores = {task: measured(row, task) for task in table.tasks}
        label = "individual adapters" if individual else method
        lines.append(
            Scored(
                label, method, row["scale"], role, scores, measured(row, AVERAGE), adapters=row["init"], source=source
            )
        )
    alone = {line.adapters: line.mean.value for line in lines if line.role == "individual"}
    return [replace(line, alone=None if line.role == "individual" else alone.get(line.adapters)) for line in lines]


def of_manifest(manifest: Mapping[str, Any], source: str, place: Path) -> list[Scored]:
    """The scores that `evaluate --save`, a selection or the Trainer put into a folder's manifest; lm-eval's apart."""
    every = [one for one in manifest.get("scores") or [] if one.get("value") is not None]
    ours, lines = [one for one in every if not one.get("harness")], []
    for found in (ours, main_of_harness(one for one in every if one.get("harness"))):
        scores = {str(one["task"]): number("value", one["value"]) for one in found}
        rows = {str(one["task"]): integer("rows", one["rows"], 0) for one in found if one.get("rows") is not None}
        metrics = {str(one["task"]): metric_of(one) for one in found if one.get("metric")}
        split = "/".join(sorted({str(one.get("split") or "") for one in found}))
        if scores:
            line = _of_folder(manifest, scores, source, place)
            lines.append(replace(line, metrics=metrics, rows=rows, split=split))
    return lines


def main_of_harness(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first metric of each task that lm-eval scored, where it is a share and more is better."""
    first: dict[str, dict[str, Any]] = {}
    for one in records:
        first.setdefault(str(one["task"]), dict(one))
    return [one for one in first.values() if one.get("higher_is_better") and -1 <= number("value", one["value"]) <= 1]


def metric_of(record: Mapping[str, Any]) -> str:
    """The metric of a manifest's score, as tables name it."""
    return f"{record['metric']} (lm-eval)" if record.get("harness") else str(record["metric"])


def of_evaluation(content: Mapping[str, Any], source: str) -> list[Scored]:
    """The file of `evaluate --out`: {task: score}, or {name: {task: score}} of the folders in one folder."""
    settings, manifest, about = (content.get(name) or {} for name in ("settings", "manifest", "tasks"))
    adapter, rows = settings.get("adapter"), settings.get("rows")
    place = Path(adapter) if isinstance(adapter, str) and os.path.isdir(adapter) else None
    several = all(isinstance(one, Mapping) for one in content["scores"].values())
    lines = []
    for name, values in content["scores"].items() if several else [("", content["scores"])]:
        scores = {str(task): number(f"score of {task!r}", value) for task, value in values.items()}
        own = place / Path(name).name if several and place is not None else place  # name: "sweep/scale_0.3"
        if several and own is not None:
            manifest = read_manifest(own) or manifest
        counts = {} if rows is None else dict.fromkeys(scores, integer("rows", rows, 0))
        counts |= {task: integer("rows", about[task]["rows"], 0) for task in scores if task in about}
        metrics = {task: str(about[task]["metric"]) for task in scores if task in about}
        if scores:
            line = _of_folder(manifest, scores, source, own)
            splits = {str(about[task]["split"]) for task in scores if task in about and about[task].get("split")}
            lines.append(replace(line, metrics=metrics, rows=counts, split="/".join(sorted(splits)) or "validation"))
            manifest = {key: value for key, value in manifest.items() if key != "scale"}  # it is the first one's
    return lines


def _of_folder(manifest: Mapping[str, Any], scores: Mapping[str, float], source: str, place: Path | None) -> Scored:
    kind, method, options = manifest.get("kind"), manifest.get("method"), manifest.get("options") or {}
    mean = Measured(statistics.fmean(scores.values()))
    measured = {task: Measured(value) for task, value in scores.items()}
    if kind not in ("merged", "emr", "checkpoint") or not method or method == "bake":
        return Scored("adapter", "adapter", None, "adapter", measured, mean, source=source, place=place)
    space = None if kind == "checkpoint" else manifest.get("space")
    label = _label(str(method), options, space, manifest.get("rank"))
    scale: Any = manifest.get("scale")
    scale = "by features" if "scale_of_layers" in manifest else None if scale is None else number("scale", scale)
    inputs = {str(task): one.get("source") for task, one in (manifest.get("inputs") or {}).items()}
    folders = {task: Path(one).resolve() for task, one in inputs.items() if isinstance(one, str) and os.path.isdir(one)}
    role: Role = "per_task" if kind == "emr" else "merge"
    return Scored(label, str(method), scale, role, measured, mean, source=source, place=place, inputs=folders)


def _label(method: str, options: Mapping[str, Any], space: Any, rank: Any) -> str:
    """The method, and what differs from its defaults, as a selection names its candidates."""
    known = METHODS.get(method)
    defaults, usual = ({}, None) if known is None else (known.options, known.space("auto"))
    given = [f"{name} {value}" for name, value in options.items() if name not in defaults or defaults[name] != value]
    name = method if usual is None or space in (None, usual) else f"{method} in {space}"
    return public(", ".join([name, *given, *([] if rank is None else [f"rank {rank}"])]))


def combine(lines: Iterable[Scored]) -> list[Combined]:
    """Tables of merges: the most tasks and lines first; each table has the lines of the same tasks and metrics.

    Where a file does not say a task's metric, it is taken to be the one of the others. A merge without scores of its
    adapters is compared with the adapters that were scored by themselves.
    """
    every = _each_once(lines)
    adapters = [line for line in every if line.role == "adapter"]
    groups: list[tuple[dict[str, str | None], list[Scored]]] = []
    for line in (_with_alone(line, adapters) for line in every if line.role != "adapter"):
        fitting = [one for one in groups if _agree(one[0], line)]
        if not fitting:
            fitting = [(dict.fromkeys(line.scores), [])]
            groups += fitting
        metrics, group = fitting[0]
        metrics.update(line.metrics)
        group.append(line)
    tables = [_combined(metrics, group) for metrics, group in groups]
    return sorted(tables, key=lambda one: (-any(line.winner for line in one.lines), -len(one.metrics), -len(one.lines)))


def adapters_alone(lines: Iterable[Scored]) -> list[Scored]:
    """The adapters that were scored by themselves."""
    return [line for line in _each_once(lines) if line.role == "adapter"]


def _combined(metrics: dict[str, str | None], group: Sequence[Scored]) -> Combined:
    lines = [line for line in group if line.role in ("merge", "per_task")]
    references = [line for line in group if line.role in ("individual", "base")]
    table = Combined(metrics, lines, references)
    by_rule = table.rule
    lines.sort(key=lambda one: (by_rule and one.value is None, -((by_rule and one.value) or one.mean).value))
    return table


def _agree(metrics: Mapping[str, str | None], line: Scored) -> bool:
    return metrics.keys() == line.scores.keys() and all(
        line.metrics.get(task) in (None, known) or known is None for task, known in metrics.items()
    )


def _each_once(lines: Iterable[Scored]) -> list[Scored]:
    """Without a folder's scores that are the same in two files."""
    every = sorted(lines, key=lambda line: not line.rows)  # the line whose rows are known is kept
    kept: list[Scored] = []
    for line in every:
        if not any(_is_same(line, one) for one in kept):
            kept.append(line)
    return kept


def _is_same(line: Scored, other: Scored) -> bool:
    if line.place is None or other.place is None or line.place.resolve() != other.place.resolve():
        return False
    return line.same_scores(other) and (line.rows == other.rows or not line.rows)


def _with_alone(line: Scored, adapters: Sequence[Scored]) -> Scored:
    if line.alone is not None or line.role not in ("merge", "per_task") or line.dropped:
        return line
    found = []
    for task in line.scores:
        scored = [one for one in adapters if task in one.scores and line.metrics.get(task) == one.metrics.get(task)]
        own = [one for one in scored if one.place is not None and one.place.resolve() == line.inputs.get(task)]
        scored = own[:1] or scored
        if len(scored) != 1:
            return line
        found.append(scored[0].scores[task].value)
    return replace(line, alone=statistics.fmean(found))


def span(low: float, high: float) -> str:
    """`"[68.9, 73.5]"`, in percent."""
    return f"[{signed(100 * low)}, {signed(100 * high)}]"


def signed(number: float, form: str = ".1f") -> str:
    """The number with a real minus sign."""
    return format(number, form).replace("-", "−")


def _per_task(method: str) -> bool:
    return method in METHODS and METHODS[method].per_task
