"""Read and check what results folders hold: selections, scores, interference, spectra, manifests and logs."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from osrm_peft.checks import integer, number
from osrm_peft.evaluation import scored
from osrm_peft.evaluation.interference import Interference, Solve
from osrm_peft.evaluation.scored import Choice, Scored
from osrm_peft.evaluation.spectra import Spectra
from osrm_peft.evaluation.tables import MultiTaskTable, Score
from osrm_peft.hub.privacy import public
from osrm_peft.io.json import parse_json
from osrm_peft.io.manifest import MANIFEST, check_manifest
from osrm_peft.io.yaml import named
from osrm_peft.merging.overlap import Overlap

NAMES = ("selection.json", "scores.json", "interference.json", "spectrum.json", MANIFEST)
EXPECTED = (
    "expected selection.json, scores (of a demo, of `osrm-peft evaluate --out` or --save), interference.json, "
    f"spectrum.json, or {MANIFEST} of a merged folder or of an adapter whose log has osrm/drift"
)
DRIFT = "osrm/drift"
_BULK = {  # fields that the page shows elsewhere, or that have a number for each layer or file
    "scores", "interference", "singular_values", "tasks", "layers", "mean", "off_diagonal", "log", "energy_kept",
    "report", "crc32", "files", "read", "ranked", "apart", "test", "individual", "base", "verdict", "manifest",
    "overlap", "regmean",
}  # fmt: skip
_WINNERS: dict[Any, str] = {"merge": "winner", "per_task": "best_per_task"}  # folders beside selection.json
_EVALUATION = re.compile(rb'\s*\{\s*"scores"\s*:\s*\{')  # how a file of `evaluate --out` begins, whatever its name

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """What one file holds.

    Attributes:
        name: the file's folder, or the file itself if its name is none of ours.
        content: what the page shows.
        made: the settings and versions that the file records.
        folder: the file's folder.
    """

    name: str
    content: T
    made: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Results:
    """What results folders hold, in the order of the folders and their files.

    Attributes:
        selections: which merge to take.
        scores: tables of scores.
        evaluations: scores of single folders.
        interference: {title of a plot: {panel: Interference}}.
        spectra: singular values.
        drift: adapters' log entries with `osrm/drift`.
        merged: {column: text} of each merged folder.
    """

    selections: list[Found[Choice]] = field(default_factory=list)
    scores: list[Found[MultiTaskTable]] = field(default_factory=list)
    evaluations: list[Found[list[Scored]]] = field(default_factory=list)
    interference: list[Found[dict[str, dict[str, Interference]]]] = field(default_factory=list)
    spectra: list[Found[Spectra]] = field(default_factory=list)
    drift: list[Found[list[dict[str, Any]]]] = field(default_factory=list)
    merged: list[Found[dict[str, Any]]] = field(default_factory=list)

    def summary(self) -> str:
        """How many results there are of each kind, as text."""
        return ", ".join(f"{kind}: {len(found)}" for kind, found in vars(self).items() if found)

    def lines(self) -> list[Scored]:
        """Everything that was scored; a winner's own folder is the line of its selection."""
        tested = [line for found in self.selections for line in found.content.test]
        lines = [line for found in self.selections for line in found.content.lines]
        lines += [line for found in self.scores for line in scored.of_table(found.content, found.name)]
        for found in self.evaluations:
            known = tested if found.folder.name in _WINNERS.values() else []
            lines += [one for one in found.content if not any(map(one.same_scores, known))]
        return lines


def gather(paths: Iterable[str | Path]) -> Results:
    """Read what results folders hold.

    Args:
        paths: folders to search, without `*.checkpoints`, hidden folders and links that lead out of them; or single
            JSON files. A file that is reached twice counts once.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path holds nothing to show, or a file is damaged.
    """
    results, seen = Results(), set[Path]()
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: name a results folder or a JSON file in it; {EXPECTED}")
        if not path.is_dir() and not path.is_file():  # a FIFO would be waited for
            raise ValueError(f"{path} is neither a folder nor a file: name a results folder or a JSON file in it")
        known = False
        for file in _files(path) if path.is_dir() else [path]:
            shown = _read(file, seen)
            known |= bool(shown)
            for kind, found in shown if file.resolve() not in seen else ():
                getattr(results, kind).append(found)
            seen.add(file.resolve())
        if not known:
            raise ValueError(f"{path} holds no results to show: {EXPECTED}")
    return results


def _files(folder: Path) -> Iterator[Path]:
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or name.endswith(".checkpoints")))
        others = sorted(name for name in names if name.endswith(".json") and name not in NAMES)
        for file in (Path(place, name) for name in (*NAMES, *others) if name in names):
            if file.is_file() and file.resolve().is_relative_to(root) and (file.name in NAMES or _is_evaluation(file)):
                yield file


def _is_evaluation(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return bool(_EVALUATION.match(opened.read(100)))
    except OSError:  # a file of others, which we may not read
        return False


def _read(file: Path, seen: Set[Path]) -> list[tuple[str, Found[Any]]]:
    """[(its field of Results, the file's content)]; empty for a file that the page does not show."""
    name = str(file.parent if file.name in NAMES else file)
    try:
        read = parse_json(file.read_text(encoding="utf-8"))
        if isinstance(read, list):  # the demo's rows of one seed: the demo's own file has them, once it is finished
            finished = (file.parent.parent / file.name).resolve() in seen
            read = {} if finished else {"scores": read}
        content = public(read) if isinstance(read, dict) else {}
        made = {key: value for key, value in content.items() if key not in _BULK}
        shown = [*_parse(content, name, file.parent), *_evaluations(read, file)] if content else []
        return [(kind, Found(name, found, made, file.parent)) for kind, found in shown]
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {f'no {error}' if isinstance(error, KeyError) else error}") from error


def _evaluations(content: Mapping[str, Any], file: Path) -> Iterator[tuple[str, list[Scored]]]:
    """Scores of one folder, from its manifest or from the file of `evaluate --out`; the paths in it are as written."""
    if content.get("kind") in ("adapter", "merged", "emr", "checkpoint"):
        found = scored.of_manifest(content, str(file.parent), file.parent)
    elif "kind" not in content and isinstance(content.get("scores"), dict):
        found = scored.of_evaluation(content, str(file))
    else:
        return
    if found:
        yield "evaluations", found


def _parse(content: dict[str, Any], name: str, folder: Path) -> Iterator[tuple[str, Any]]:
    kind, log = content.get("kind"), content.get("log")
    if "kind" in content:
        check_manifest(content)
    if kind == "selection":
        places = {role: folder / one for role, one in _WINNERS.items() if (folder / one / MANIFEST).is_file()}
        yield "selections", scored.of_selection(content, name, places)
    if "kind" not in content and isinstance(content.get("scores"), list):
        with named("scores"):
            yield "scores", _table(content["scores"])
    if isinstance(content.get("interference"), dict):
        runs = content["interference"].items()
        with named("interference"):
            panels = {run: {init: _interference(one) for init, one in by_init.items()} for run, by_init in runs}
        yield "interference", {run: by_init for run, by_init in panels.items() if by_init}
    if {"tasks", "relative_to", "layers"} <= set(content):
        yield "interference", {"": {"adapters": _interference(content)}}
    if isinstance(content.get("singular_values"), dict):
        with named("singular_values"):
            yield "spectra", _spectra(content["singular_values"])
    if kind == "adapter" and log:
        with named("log"):
            found = [_drift(entry) for entry in log if DRIFT in entry]
        if found:
            yield "drift", found
    if kind in ("merged", "emr", "checkpoint") and content.get("method") != "bake":
        yield "merged", _merge(content)


def _table(rows: Sequence[Mapping[str, Any]]) -> MultiTaskTable:
    def score(init: Any, method: Any, scale: Any, seed: int, task: Any, score: Any) -> Score:
        lam = None if scale is None else number("scale", scale)
        return Score(str(init), str(method), lam, integer("seed", seed, 0), str(task), number("score", score))

    table = MultiTaskTable.of(score(**row) for row in rows)
    if not table.rows:
        raise ValueError("no row of it has a score of every task")
    return table


def _drift(entry: Mapping[str, Any]) -> dict[str, float]:
    layers = {name: number(name, value) for name, value in entry.items() if name.startswith(f"{DRIFT}/")}
    return {"step": number("step", entry["step"]), DRIFT: number(DRIFT, entry[DRIFT]), **layers}


def _spectra(found: Mapping[str, Mapping[str, Any]]) -> Spectra:
    return {
        model: {name: [number(name, value) for value in values] for name, values in matrices.items()}
        for model, matrices in found.items()
    }


def _interference(found: Mapping[str, Any]) -> Interference:
    tasks = list(map(str, found["tasks"]))
    layers = {name: _matrix(f"layer {name!r}", rows, tasks) for name, rows in found["layers"].items()}
    a, b = (
        {name: _overlap(f"overlap of {side} in layer {name!r}", one, tasks) for name, one in of["layers"].items()}
        for side in ("A", "B")
        for of in [found.get("overlap", {}).get(side, {"layers": {}})]
    )
    if not tasks or not (layers or a or b):
        raise ValueError("it has no layers or no tasks")
    solves = {name: _solve(f"regmean in layer {name!r}", one) for name, one in found.get("regmean", {}).items()}
    relative_to = found["relative_to"]
    return Interference(tasks, layers, None if relative_to is None else str(relative_to), a, b, solves)


def _solve(name: str, found: Mapping[str, Any]) -> Solve:
    ridges = (None if one is None else number(name, one, 0) for one in (found["ridge"], found["exact_ridge"]))
    return Solve(_number(name, found["condition"], math.inf), *ridges)


def _overlap(name: str, found: Mapping[str, Any], tasks: Sequence[str]) -> Overlap:
    shared, largest, random = (_matrix(name, found[part], tasks) for part in ("shared", "largest", "random"))
    return Overlap(shared, largest, random, _number(name, found["tsv"], math.nan))


def _matrix(name: str, rows: Sequence[Sequence[float | None]], tasks: Sequence[str]) -> torch.Tensor:
    matrix = torch.tensor([[_number(name, x, math.nan) for x in row] for row in rows], dtype=torch.float64)
    if matrix.shape != (len(tasks), len(tasks)):
        raise ValueError(f"{name} is not a matrix of {len(tasks)} tasks")
    return matrix


def _number(name: str, value: float | None, unknown: float) -> float:
    return unknown if value is None else number(name, value)


def _merge(manifest: Mapping[str, Any]) -> dict[str, Any]:
    rank, kept = manifest.get("written_rank", manifest.get("rank")), manifest.get("energy_kept")
    return {
        "method": manifest["method"],
        "λ": "by features" if "scale_of_layers" in manifest else f"{number('scale', manifest['scale']):g}",
        "space": manifest.get("space") or "–",
        "rank": "–" if rank is None else rank,
        "least energy kept": f"{min(number('energy_kept', one) for one in kept.values()):.4f}" if kept else "–",
        "inputs": ", ".join(manifest["inputs"]),
    }
