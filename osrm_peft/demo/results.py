"""The demo's files: rows of scores, written as they are made, and the report."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from osrm_peft.evaluation.interference import Interference
from osrm_peft.evaluation.tables import MultiTaskTable, Score
from osrm_peft.io.json import parse_json, write_json
from osrm_peft.io.manifest import versions


class Scores:
    """The rows of scores of one seed, in a file that is complete after every row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores = read_scores(path)

    def has(self, init: str, method: str, scale: float | None) -> bool:
        """Whether this row is finished."""
        return any((score.init, score.method, score.scale) == (init, method, scale) for score in self.scores)

    def add(self, init: str, method: str, scale: float | None, seed: int, values: dict[str, float]) -> None:
        """Append a row, {task: score}, and write."""
        self.scores += [Score(init, method, scale, seed, task, value) for task, value in values.items()]
        write_json(self.path, [asdict(score) for score in self.scores])


def read_scores(path: Path) -> list[Score]:
    """The rows of a file that `Scores` wrote; none without a file."""
    if not path.is_file():
        return []
    try:
        return [Score(**row) for row in parse_json(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and it is made again") from error


def report(
    table: MultiTaskTable,
    default: MultiTaskTable,
    measured: Sequence[dict[str, Interference]],
    settings: dict[str, Any],
    seeds: Sequence[int],
) -> str:
    """The Markdown report: tables, plots, settings and versions."""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    listed = ", ".join(map(str, seeds))
    by_seed = ", ".join(
        f"{100 * m['plain LoRA'].off_diagonal():.3g} → {100 * m['OSRM'].off_diagonal():.3g}" for m in measured
    )
    return f"""# Demo: plain-LoRA and OSRM adapters, merged

Scores in percent on {settings["recipe"]["validation_rows"] or "all"} validation rows a task; seed {listed}{
        "" if len(seeds) > 1 else " (one seed: differences of a few points are noise)"
    }. Metrics: accuracy (questions, movie_reviews),
Matthews correlation (sms_spam), mean of Pearson and Spearman correlation (tweets, product_reviews, editorials).

## Each merge at its paper's scale

{default.markdown()}

## Every scale

{table.markdown()}

![average score against the scale](scales.png)

## Who acts on whose features

E‖τ_j h_t‖² / E‖W₀ h_t‖² in percent: how strongly the adapter of the row acts on the features of the column's task,
geometric mean over layers (seed {seeds[0]}). Off the diagonal, plain LoRA → OSRM, a number a seed: {by_seed}.

![interference of plain-LoRA and OSRM adapters](interference.png)

## How it was made

`osrm-peft demo --seeds {len(seeds)}` on {platform.system()} {platform.machine()}, {made}

```json
{json.dumps(settings, ensure_ascii=False)}
```
"""
