"""The study's tables, from the predictions of its cells: means over seeds, and paired differences with intervals."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from kept.settings import MERGES, SEEDS, SWEPT, TUNING_SEED, Cell, Merge, cells
from kept.trials import TRIALS
from osrm_peft.evaluation.bootstrap import interval, metric_on, resamples
from osrm_peft.evaluation.tables import markdown_table

RESAMPLES = 500


@dataclass(frozen=True)
class Scored:
    """The predictions of one cell: of one seed."""

    about: dict[str, Any]
    found: dict[str, np.ndarray]

    @classmethod
    def of(cls, folder: Path) -> "Scored":
        """Read a cell's folder."""
        return cls(json.loads((folder / "cell.json").read_text()), dict(load_file(folder / "predictions.safetensors")))

    def score(self, key: str, half: int | None = None) -> dict[str, float]:
        """{task: score in percent} of an entry, on all rows or on those of even (0) or odd (1) place."""
        rows = slice(None) if half is None else slice(half, None, 2)
        return {name: float(self._metric(key, name, rows)[0]) for name in self.about["tasks"]}

    def mean(self, key: str, half: int | None = None) -> float:
        """The mean over tasks."""
        return statistics.fmean(self.score(key, half).values())

    def resampled(self, key: str) -> np.ndarray:
        """(1 + RESAMPLES,) the mean over tasks, on all rows and on resamples, the same for every entry and init."""
        return np.mean([self._metric(key, name, slice(None), RESAMPLES) for name in self.about["tasks"]], axis=0)

    def chosen(self, merge: Merge) -> float:
        """The mean over tasks at the λ that is best on the other half of the rows, each half in turn."""
        label, _, _, grid = merge
        keys = [f"{label}, λ {scale:g}" for scale in grid]
        best = {half: max(keys, key=lambda key: self.mean(key, half)) for half in (0, 1)}
        return (self.mean(best[0], 1) + self.mean(best[1], 0)) / 2

    def kept(self, score: float) -> float:
        """The share of the adaptation that a score keeps, in percent."""
        base = self.mean("base")
        return 100 * (score - base) / (self.mean("alone") - base)

    def note(self, key: str) -> float:
        """The mean over tasks of what training did to A."""
        return statistics.fmean(note[key] for note in self.about["notes"].values())

    def has(self, key: str) -> bool:
        """Whether the entry was scored."""
        return all(f"{key}/{name}" in self.found for name in self.about["tasks"])

    def _metric(self, key: str, name: str, rows: slice, number: int = 0) -> np.ndarray:
        predictions, labels = self.found[f"{key}/{name}"][rows], self.found[f"label/{name}"][rows]
        counts = resamples(name, len(labels), 0, number)
        return 100 * metric_on(self.about["tasks"][name]["metric"], predictions, labels, counts)


Group = list[Scored]  # one a seed


def of(out: Path, part: str, against: str | None = None) -> str:
    """The tables of a part, from the rows of which all seeds are there.

    Args:
        against: the row whose differences from the others are shown; None: the first that is like each.
    """
    groups = _groups(out, part)
    if not groups:
        return f"{part}: no row has all seeds yet\n"
    known = TRIALS if part == "trials" else MERGES
    merges = [merge for merge in known if all(one.has(_key(merge)) for group in groups.values() for one in group)]
    return "\n\n".join(
        [_scores(groups, merges), _kept(groups, merges), _training(groups), _differences(groups, merges, against)]
    )


def _groups(out: Path, part: str) -> dict[str, Group]:
    """{row: its cells} of which every seed is made."""
    rows: dict[str, list[Cell]] = {}
    for cell in cells(part):
        if cell.seed != TUNING_SEED:
            rows.setdefault(_row(cell), []).append(cell)
    done = {row: [out / cell.key for cell in found] for row, found in rows.items()}
    complete = {row: found for row, found in done.items() if all((one / "cell.json").exists() for one in found)}
    # what the others are compared with comes first
    order = sorted(complete, key=lambda row: (not row.startswith("plain"), rows[row][0].tasks))
    return {row: [Scored.of(one) for one in complete[row]] for row in order}


def _row(cell: Cell) -> str:
    """What tells the cell from the others of its part."""
    parts = [f"N = {cell.tasks}" * (cell.tasks > 0), f"r = {cell.r}" * (cell.r != 8), f"k = {cell.k}" * (cell.k != 100)]
    return ", ".join([cell.init, *filter(None, parts), *(["unknown partners"] if cell.unknown else [])])


def _key(merge: Merge) -> str:
    label, _, published, _ = merge
    return label if published is None else f"{label}, λ {published:g}"


def _swept(groups: dict[str, Group], merges: Sequence[Merge]) -> list[Merge]:
    every = [one for group in groups.values() for one in group]
    return [
        merge
        for merge in merges
        if len(merge[3]) > 1 and all(one.has(f"{merge[0]}, λ {scale:g}") for one in every for scale in merge[3])
    ]


def _columns(groups: dict[str, Group], merges: Sequence[Merge]) -> dict[str, Callable[[Scored], float]]:
    """{column: an entry's score of one seed}: at the published λ, and at a chosen one."""
    columns: dict[str, Callable[[Scored], float]] = {}
    swept = _swept(groups, merges)
    for merge in merges:
        columns[_key(merge)] = partial(Scored.mean, key=_key(merge))
        if merge in swept:
            keys = [f"{merge[0]}, λ {scale:g}" for scale in merge[3]]
            columns |= {key: partial(Scored.mean, key=key) for key in keys if merge[0] in SWEPT}
            columns[f"{merge[0]}, λ chosen"] = partial(Scored.chosen, merge=merge)
    return columns


def _scores(groups: dict[str, Group], merges: Sequence[Merge]) -> str:
    entries = {key: partial(Scored.mean, key=key) for key in ("alone", "base")} | _columns(groups, merges)
    head = ["scores", *groups]
    lines = [[name, *(_cell([of(one) for one in group]) for group in groups.values())] for name, of in entries.items()]
    return markdown_table(head, lines)


def _kept(groups: dict[str, Group], merges: Sequence[Merge]) -> str:
    lines = []
    for name, score in _columns(groups, merges).items():
        lines.append([name, *(_cell([one.kept(score(one)) for one in group], 0) for group in groups.values())])
    return markdown_table(["adaptation kept", *groups], lines)


def _training(groups: dict[str, Group]) -> str:
    lines = []
    for row, group in groups.items():
        before, after = ([100 * one.note(key) for one in group] for key in ("before", "after"))
        drift, rates = _cell([one.note("drift") for one in group], 3), {one.about["rate"] for one in group}
        lines.append([row, ", ".join(f"{rate:g}" for rate in rates), drift, _cell(before, 2), _cell(after, 2)])
    return markdown_table(["training", "rate", "drift of A", "energy before", "energy after"], lines)


def _differences(groups: dict[str, Group], merges: Sequence[Merge], chosen: str | None) -> str:
    """Each group against one of another init, on the same rows: mean over seeds, 95 % over resampled rows and seeds."""
    references = {row: chosen or _reference(row, groups) for row in groups}
    against = {row: groups[one] for row, one in references.items() if one != row}
    if not against or any(
        one.about["tasks"] != other[0].about["tasks"] for row, other in against.items() for one in groups[row]
    ):
        return ""
    drawn = np.random.default_rng(0).integers(len(SEEDS), size=(RESAMPLES, len(SEEDS)))
    lines = []
    for name in ("alone", *map(_key, merges)):
        line = [name]
        for row, other in against.items():
            pairs = zip(groups[row], other, strict=True)
            found = np.stack([one.resampled(name) - plain.resampled(name) for one, plain in pairs])  # (seeds, 1 + B)
            by_seed = np.take_along_axis(found[:, 1:].T, drawn, axis=1).mean(1)
            low, high = interval(np.concatenate([found[:, :1].mean(0), by_seed]))
            line.append(f"{found[:, 0].mean():+.1f} ({low:+.1f} … {high:+.1f})")
        lines.append(line)
    init = chosen or next(iter(groups)).partition(", ")[0]
    return markdown_table([f"against {init}", *against], lines)


def _reference(row: str, groups: dict[str, Group]) -> str:
    """The group that a group is compared with: the first of as many tasks and the same rank, or the first of all."""
    first, about = next(iter(groups)), row.partition(", ")[2]
    alike = next(other for other in groups if other.partition(", ")[2] == about)
    return alike if alike != row or row.startswith("plain") else first


def _cell(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation."""
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
