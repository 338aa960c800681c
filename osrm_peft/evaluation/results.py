"""Read and check what results folders hold: scores, interference, spectra, manifests and logs."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from osrm_peft.checks import integer, number
from osrm_peft.evaluation.interference import Interference
from osrm_peft.evaluation.spectra import Spectra
from osrm_peft.evaluation.tables import MultiTaskTable, Score
from osrm_peft.hub.privacy import public
from osrm_peft.io.json import parse_json
from osrm_peft.io.manifest import MANIFEST, check_manifest
from osrm_peft.io.yaml import named

NAMES = ("scores.json", "interference.json", "spectrum.json", MANIFEST)
EXPECTED = (
    f"expected scores.json (of a demo), interference.json, spectrum.json, or {MANIFEST} of a merged folder or of an "
    "adapter whose log has osrm/drift"
)
DRIFT = "osrm/drift"
_BULK = {  # fields that the page shows elsewhere, or that have a number for each layer or file
    "scores", "interference", "singular_values", "tasks", "layers", "mean", "off_diagonal", "log", "energy_kept",
    "report", "crc32", "files", "read",
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """What one file holds.

    Attributes:
        name: the file's folder, or the file itself if its name is none of ours.
        content: what the page shows.
        made: the settings and versions that the file records.
    """

    name: str
    content: T
    made: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What results folders hold, in the order of the folders and their files.

    Attributes:
        scores: tables of scores.
        interference: {title of a plot: {panel: Interference}}.
        spectra: singular values.
        drift: adapters' log entries with `osrm/drift`.
        merged: {column: text} of each merged folder.
    """

    scores: list[Found[MultiTaskTable]] = field(default_factory=list)
    interference: list[Found[dict[str, dict[str, Interference]]]] = field(default_factory=list)
    spectra: list[Found[Spectra]] = field(default_factory=list)
    drift: list[Found[list[dict[str, Any]]]] = field(default_factory=list)
    merged: list[Found[dict[str, Any]]] = field(default_factory=list)

    def summary(self) -> str:
        """How many results there are of each kind, as text."""
        return ", ".join(f"{kind}: {len(found)}" for kind, found in vars(self).items() if found)


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
            kind, found = _read(file)
            known |= kind is not None
            if kind is not None and file.resolve() not in seen:
                getattr(results, kind).append(found)
            seen.add(file.resolve())
        if not known:
            raise ValueError(f"{path} holds no results to show: {EXPECTED}")
    return results


def _files(folder: Path) -> Iterator[Path]:
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or name.endswith(".checkpoints")))
        for file in (Path(place, name) for name in NAMES if name in names):
            if file.is_file() and file.resolve().is_relative_to(root):
                yield file


def _read(file: Path) -> tuple[str | None, Found[Any]]:
    """(its field of Results, the file's content); (None, …) for a file that the page does not show."""
    name = str(file.parent if file.name in NAMES else file)
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        content = public(content) if isinstance(content, dict) else {}  # a list: the demo's rows of one seed of several
        kind, found = _parse(content)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {f'no {error}' if isinstance(error, KeyError) else error}") from error
    return kind, Found(name, found, {key: value for key, value in content.items() if key not in _BULK})


def _parse(content: dict[str, Any]) -> tuple[str | None, Any]:
    kind, log = content.get("kind"), content.get("log")
    if "kind" in content:
        check_manifest(content)
    if "kind" not in content and isinstance(content.get("scores"), list):
        with named("scores"):
            return "scores", _table(content["scores"])
    if isinstance(content.get("interference"), dict):
        runs = content["interference"].items()
        with named("interference"):
            panels = {run: {init: _interference(one) for init, one in by_init.items()} for run, by_init in runs}
        return "interference", {run: by_init for run, by_init in panels.items() if by_init}
    if {"tasks", "relative_to", "layers"} <= set(content):
        return "interference", {"": {"adapters": _interference(content)}}
    if isinstance(content.get("singular_values"), dict):
        with named("singular_values"):
            return "spectra", _spectra(content["singular_values"])
    if kind == "adapter" and log:
        with named("log"):
            found = [_drift(entry) for entry in log if DRIFT in entry]
        if found:
            return "drift", found
    if kind in ("merged", "emr", "checkpoint"):
        return "merged", _merge(content)
    return None, None


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
    tasks, layers = list(map(str, found["tasks"])), {}
    for name, rows in found["layers"].items():
        shares = [[math.nan if x is None else number(f"layer {name!r}", x) for x in row] for row in rows]
        layers[name] = torch.tensor(shares, dtype=torch.float64)
        if layers[name].shape != (len(tasks), len(tasks)):
            raise ValueError(f"layer {name!r} is not a matrix of {len(tasks)} tasks")
    if not layers or not tasks:
        raise ValueError("it has no layers or no tasks")
    return Interference(tasks, layers, str(found["relative_to"]))


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
