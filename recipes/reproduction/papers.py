"""What the papers print beside what experiments found, difference by difference: models and tasks are others here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from osrm_peft.evaluation.tables import AVERAGE, MultiTaskTable, Score, markdown_table
from osrm_peft.io.yaml import parse_yaml
from reproduction.suite import OSRM, PLAIN

Gains = dict[tuple[str, str], list[float]]  # {(adapters, merge): percentage points, one a seed}


@cache
def figures() -> dict[str, Any]:
    """The figures that the papers print: `papers.yaml`."""
    return parse_yaml(Path(__file__).with_name("papers.yaml").read_text(encoding="utf-8"))


def printed(experiment: str, model: str) -> list[Score]:
    """The scores that the OSRM paper prints for an experiment: by task, or their averages; [] for none."""
    known = figures().get(experiment, {})
    found = []
    for init, merges in known.get("rows", {}).get(model, {}).items():
        for merge, row in merges.items():
            cells = zip(known["columns"][:-1], row[:-1], strict=True) if isinstance(row, list) else [(AVERAGE, row)]
            found += [Score(init, merge, None, 0, task, score / 100) for task, score in cells]
    return found


def averaged(scores: Sequence[Score]) -> list[Score]:
    """The mean over tasks."""
    groups: dict[Score, list[float]] = {}
    for score in scores:
        groups.setdefault(replace(score, task=AVERAGE, score=0.0), []).append(score.score)
    return [replace(score, score=fmean(found)) for score, found in groups.items()]


def gains(scores: Sequence[Score], plain: Sequence[Score] = ()) -> list[Score]:
    """What other adapters score above plain LoRA, paired by merge, λ, seed and task.

    Args:
        plain: where plain LoRA is looked up if `scores` have none: the main table.
    """
    have = any(score.init.startswith(PLAIN) for score in scores)
    known = {replace(one, score=0.0): one.score for one in (scores if have else plain) if one.init.startswith(PLAIN)}
    found = []
    for score in scores:
        name = score.init.replace(OSRM, f"{OSRM} − {PLAIN}", 1) if OSRM in score.init else f"{score.init} − {PLAIN}"
        for init in (score.init.replace(OSRM, PLAIN, 1), PLAIN):
            partner = replace(score, init=init, score=0.0)
            if partner in known and not score.init.startswith(PLAIN):
                found.append(replace(score, init=name, score=score.score - known[partner]))
                break
    return found


def comparison(experiment: str, folders: Mapping[str, Path], paper: str | None = None) -> list[str]:
    """What the papers have of an experiment, beside ours, as Markdown.

    Args:
        folders: {column: where `write_outputs` wrote}; those without the experiment's scores are left out.
        paper: the paper's model that ours is; None: another, which is compared with all of the paper's.
    """
    if experiment == "lore":
        return [text for folder in folders.values() for text in _lore(folder)]
    known = figures().get(experiment, {})
    tables = known.get("tables", {})
    models = [model for model in tables if paper in (None, model)]
    texts = [f"The paper's {figures()['claims'][experiment]}"] if experiment in figures()["claims"] else []
    if paper is not None and paper in tables:
        texts += [f"The paper's {tables[paper]}:", MultiTaskTable.of(printed(experiment, paper)).markdown()]
    theirs = {model: _by_row(printed(experiment, model), printed("main", model)) for model in models}
    ours = {name: _by_row(_read(folder / experiment), _read(folder / "main")) for name, folder in folders.items()}
    return [*texts, *_side_by_side({f"{m} ({tables[m]})": found for m, found in theirs.items()}, ours)]


def _side_by_side(theirs: Mapping[str, Gains], ours: Mapping[str, Gains]) -> list[str]:
    """A row for each difference that the paper has, and where ours have its sign."""
    rows = list(dict.fromkeys(row for found in theirs.values() for row in found))
    ours = {name: found for name, found in ours.items() if any(row in found for row in rows)}
    if not rows:
        return []
    mean = {row: [fmean(found[row][0] for found in theirs.values() if row in found)] for row in rows}
    columns = {**theirs, **({"their mean": mean} if len(theirs) > 1 else {}), **ours}
    table = markdown_table(
        ["adapters", "merge", *columns],
        [[*row, *(_cell(found.get(row, [])) for found in columns.values())] for row in rows],
        names=2,
    )
    signs = []
    for name, found in ours.items():
        both = [(mean[row][0], fmean(found[row])) for row in rows if row in found and row[1] != "individual"]
        signs.append(f"{name} {sum(a * b > 0 for a, b in both)} of {len(both)}")
    end = [f"Merges in which the sign is the paper's: {', '.join(signs)}."] if signs else []
    return ["Differences in points, the average over tasks, the paper's and ours:", table, *end]


def _lore(folder: Path) -> list[str]:
    """What merges add to single models and to their average, LoRE's Table 1 and ours."""
    known = figures()["lore"]
    tasks, run = _read(folder / "lore/tasks"), _read(folder / "lore/run")
    if not tasks or not run:
        return []
    columns: dict[str, dict[str, float]] = {}
    for name, beginning in {"pairs of models": ("deepseek", "wizard"), "checkpoints": "checkpoints"}.items():
        places = [place for place, column in enumerate(known["columns"]) if column.startswith(beginning)]
        columns[f"the paper's {name}"] = {one: fmean(row[p] for p in places) for one, row in known["rows"].items()}
    for name, scores in {"our task models": tasks, "our checkpoints": run}.items():
        found = {one.method: 100 * one.score for one in averaged(scores)}  # of single checkpoints the last
        columns[name] = {"baseline": found.pop("individual"), **found}
    rows = [(one, "baseline") for one in known["rows"] if one != "baseline"]
    rows += [(one, "average") for one, _ in rows if one != "average"]
    cells = [[f"{a} − {b}", *(f"{found[a] - found[b]:+.1f}" for found in columns.values())] for a, b in rows]
    return [
        "Differences in points, LoRE's Table 1 and ours; our baseline is the single models, or the last checkpoint:",
        markdown_table(["merge", *columns], cells),
    ]


def _by_row(scores: Sequence[Score], plain: Sequence[Score]) -> Gains:
    found: Gains = {}
    for one in gains(averaged(scores), averaged(plain)):
        found.setdefault((one.init, one.method), []).append(100 * one.score)
    return found


def _read(folder: Path) -> list[Score]:
    path = folder / "scores.json"
    return [Score(**one) for one in json.loads(path.read_text(encoding="utf-8"))["scores"]] if path.is_file() else []


def _cell(found: Sequence[float]) -> str:
    return f"{fmean(found):+.1f}" + (f" ± {stdev(found):.1f}" if len(found) > 1 else "") if found else ""
