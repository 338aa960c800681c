"""The page's ranked table: its lines as text, bars, links and λ curves."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from osrm_peft.evaluation.plots import Point
from osrm_peft.evaluation.scored import Combined, Measured, Scored, signed


class Links:
    """Relative addresses of folders, from the page.

    Attributes:
        base: the folder of the page; None: nothing is linked.
    """

    def __init__(self, base: Path | None) -> None:
        self.base = None if base is None else base.resolve()

    def to(self, folder: Path | None, name: str = "") -> str | None:
        """The address of a folder, or of a file in it; None if it is not here, or far from the page.

        A folder is near if it lies below the page's folder or below that folder's parent: the address then shows no
        other folder of this machine.
        """
        if self.base is None or folder is None or not (folder / name).exists():
            return None
        place = (folder / name).resolve()
        if not any(place.is_relative_to(near) for near in (self.base, self.base.parent)) or place == self.base.parent:
            return None
        address = quote(Path(os.path.relpath(place, self.base)).as_posix().encode(errors="surrogateescape"))
        return address if address.startswith(".") else f"./{address}"


def table_view(table: Combined, links: Links) -> dict[str, Any]:
    """What the page's template shows of one table."""
    finalists = [line for line in table.lines if not line.dropped]
    dropped = [line for line in table.lines if line.dropped]
    merges = [line for line in finalists if line.role == "merge"]
    every = [one for line in (*table.lines, *table.references) for one in (line.mean, *_of_one_task(table, line))]
    ends = [end for one in every for end in (one.value, one.low, one.high) if end is not None]
    view = _Lines(table, links, min(ends), max(ends), _best(merges))
    groups = {"": merges, "With a mask for each task": [line for line in finalists if line.role == "per_task"]}
    return {
        "tasks": [{"name": task, "metric": metric, "rows": _counted(table, task)} for task, metric in _tasks(table)],
        "single": next(iter(table.metrics)) if len(table.metrics) == 1 else None,
        "groups": {title: [view.line(line) for line in lines] for title, lines in groups.items() if lines},
        "references": [view.line(line) for line in table.references],
        "dropped": [view.line(line) for line in dropped],
        "methods": list(dict.fromkeys(line.method for line in finalists)),
        "by_rule": table.rule,
        "kept": any(line.kept is not None for line in table.lines),
        "alone": any(line.alone is not None for line in finalists),
        "counted": any(line.rows for line in table.lines),
        "margins": sorted({one.over_seeds for one in every if one.low is not None}),
        "mixed": len({tuple(sorted(line.rows.items())) for line in finalists}) > 1,
    }


def adapter_rows(lines: Iterable[Scored]) -> list[dict[str, Any]]:
    """A row for each task of each adapter that was scored by itself."""
    return [
        {
            "line": line,
            "task": task,
            "score": one.percent(),
            "value": one.value,
            "metric": line.metrics.get(task),
            "rows": _rows([line.rows[task]] if task in line.rows else [], line.split),
        }
        for line in lines
        for task, one in line.scores.items()
    ]


def curves(table: Combined) -> dict[str, dict[str, list[Point]]]:
    """{method and options: {line: its points}} of the merges that were scored at more than one λ."""
    found: dict[str, dict[str, list[Point]]] = {}
    several = len({line.source for line in table.lines if line.adapters}) > 1
    for line in table.lines:
        if isinstance(line.scale, float):
            name = f"{line.adapters} ({Path(line.source).name})" if line.adapters and several else line.adapters
            name = name or (Path(line.source).name if line.value is not None else "folders")
            one, (low, high) = line.mean, (line.mean.low, line.mean.high)
            ends = (one.value if low is None else low, one.value if high is None else high)
            point = Point(line.scale, 100 * one.value, 100 * ends[0], 100 * ends[1], line.dropped)
            found.setdefault(line.label, {}).setdefault(name, []).append(point)
    swept = {
        label: {name: points for name, points in lines.items() if len({point.scale for point in points}) > 1}
        for label, lines in found.items()
    }
    return {label: lines for label, lines in swept.items() if lines}


class _Lines:
    """Lines as the template shows them.

    Attributes:
        low, high: the ends of the bars.
        best: {column: the highest score of a merge}; "" is the mean.
    """

    def __init__(self, table: Combined, links: Links, low: float, high: float, best: dict[str, float]) -> None:
        self.table, self.links, self.best = table, links, best
        self.low, self.width = low, (high - low) or 1.0
        self.short = _short({line.source for line in table.lines})

    def line(self, line: Scored) -> dict[str, Any]:
        """One line."""
        competes = line.role == "merge" and not line.dropped
        off = None if line.alone is None else line.mean.value - line.alone
        return {
            "line": line,
            "scale": line.scale if isinstance(line.scale, str) else "" if line.scale is None else f"{line.scale:g}",
            "from": self._from(line),
            "mean": self._cell("", line.mean, competes),
            "bar": self._bar(line.mean),
            "off": "" if off is None else signed(100 * off, "+.1f"),
            "off_value": "" if off is None else f"{off:.6f}",
            "cells": [self._cell(task, line.scores[task], competes) for task, _ in _tasks(self.table)],
            "rows": _rows(list(line.rows.values()) if line.rows.keys() == line.scores.keys() else [], line.split),
        }

    def _from(self, line: Scored) -> list[tuple[str, str | None]]:
        """What stands below the name: [(text, address or None)]."""
        parts: list[tuple[str, str | None]] = [(line.adapters, None)] if line.adapters else []
        name = self.short.get(line.source, line.source)
        if line.place is not None:
            in_a_file = name.endswith(".json")  # of `evaluate --out`
            shown = line.place.name if line.value is not None or in_a_file else name
            card = self.links.to(line.place, "README.md")
            parts += [(shown, self.links.to(line.place)), *([("card", card)] if card else [])]
            parts += [(name, None)] if in_a_file else []
        elif len(self.short) > 1 and name:
            parts.append((name, None))
        return parts

    def _cell(self, column: str, one: Measured, competes: bool) -> dict[str, Any]:
        best = competes and one.value >= self.best[column] - 1e-12
        return {"text": signed(100 * one.value), "margin": one.margin, "value": f"{one.value:.6f}", "best": best}

    def _bar(self, one: Measured) -> dict[str, str]:
        low, high = (one.value if end is None else end for end in (one.low, one.high))
        ends = {"at": one.value, "low": low, "high": high}
        return {name: f"{100 * (end - self.low) / self.width:.1f}" for name, end in ends.items()}


def _tasks(table: Combined) -> list[tuple[str, str | None]]:
    """The columns beside the mean, which is that of a single task itself."""
    return list(table.metrics.items()) if len(table.metrics) > 1 else []


def _of_one_task(table: Combined, line: Scored) -> Sequence[Measured]:
    return [] if len(table.metrics) > 1 else list(line.scores.values())


def _best(lines: Sequence[Scored]) -> dict[str, float]:
    tasks = lines[0].scores if lines else []
    return {"": max((line.mean.value for line in lines), default=0.0)} | {
        task: max(line.scores[task].value for line in lines) for task in tasks
    }


def _counted(table: Combined, task: str) -> str:
    counts = table.rows_of(task)
    return f"{'–'.join(f'{count:,}' for count in counts)} rows" if counts else ""


def _rows(counts: Sequence[int], split: str) -> dict[str, str]:
    shown = split if split == "test" else ""
    return {"text": f"{sum(counts):,}" if counts else "–", "value": str(sum(counts)) if counts else "", "split": shown}


def _short(names: Iterable[str]) -> dict[str, str]:
    """{name: the name below the folder that all have in common}."""
    names = set(names)
    try:
        common = os.path.commonpath(names)
    except ValueError:  # none, or absolute and relative ones
        return {name: name for name in names}
    return {name: os.path.relpath(name, common) if common and name != common else name for name in names}
