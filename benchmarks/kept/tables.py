"""The study's tables, from the predictions of its cells."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from osrm_peft.evaluation.bootstrap import metric_on


@dataclass(frozen=True)
class Scored:
    """The predictions of one cell."""

    about: dict[str, Any]
    found: dict[str, np.ndarray]

    @classmethod
    def of(cls, folder: Path) -> "Scored":
        """Read a cell's folder."""
        return cls(json.loads((folder / "cell.json").read_text()), dict(load_file(folder / "predictions.safetensors")))

    def score(self, key: str, half: int | None = None) -> dict[str, float]:
        """{task: score in percent} of an entry, on all rows or on those of even (0) or odd (1) place."""
        rows = slice(None) if half is None else slice(half, None, 2)
        return {name: self._metric(key, name, rows) for name in self.about["tasks"]}

    def _metric(self, key: str, name: str, rows: slice) -> float:
        predictions, labels = self.found[f"{key}/{name}"][rows], self.found[f"label/{name}"][rows]
        metric = self.about["tasks"][name]["metric"]
        return 100 * float(metric_on(metric, predictions, labels, np.ones((1, len(labels))))[0])

    def mean(self, key: str, half: int | None = None) -> float:
        """The mean over tasks."""
        return statistics.fmean(self.score(key, half).values())

    def note(self, key: str) -> float:
        """The mean over tasks of what training did to A."""
        return statistics.fmean(one[key] for one in self.about["notes"].values())


def of(out: Path, part: str) -> str:
    """The tables of a part."""
    return ""
