"""Browse results: one self-contained HTML page of the scores, plots and manifests that lie in results folders."""

import base64
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from osrm_peft.checkpoints.spectra import Spectra, plot_spectra
from osrm_peft.checks import integer, number
from osrm_peft.crosstalk import Interference
from osrm_peft.files import MANIFEST, check_file, check_manifest, new_file, parse_json
from osrm_peft.hub import public
from osrm_peft.report import MultiTaskTable, Score, plot_drift, plot_interference, plot_label, plot_scales
from osrm_peft.yaml_io import named

NAMES = ("scores.json", "interference.json", "spectrum.json", MANIFEST)
EXPECTED = (
    f"expected scores.json (of a demo), interference.json, spectrum.json, or {MANIFEST} of a merged folder or of an "
    "adapter whose log has osrm/drift"
)
DRIFT = "osrm/drift"
_BULK = {  # what the page shows otherwise, or what has a number for each layer or file
    "scores", "interference", "singular_values", "tasks", "layers", "mean", "off_diagonal", "log", "energy_kept",
    "report", "crc32", "files", "read",
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """What one file holds.

    Attributes:
        name: its folder, or the file itself where we would have named it differently.
        content: what the page shows.
        made: the settings and versions that the file records.
    """

    name: str
    content: T
    made: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What results folders hold, in the order in which it was found.

    Attributes:
        scores: tables of scores.
        interference: {title of a plot: {panel: Interference}}.
        spectra: singular values.
        drift: of adapters, the log entries that have `osrm/drift`.
        merged: of merged folders, {column: text}.
    """

    scores: list[Found[MultiTaskTable]] = field(default_factory=list)
    interference: list[Found[dict[str, dict[str, Interference]]]] = field(default_factory=list)
    spectra: list[Found[Spectra]] = field(default_factory=list)
    drift: list[Found[list[dict[str, Any]]]] = field(default_factory=list)
    merged: list[Found[dict[str, Any]]] = field(default_factory=list)

    def summary(self) -> str:
        """How many there are of each kind."""
        return ", ".join(f"{kind}: {len(found)}" for kind, found in vars(self).items() if found)


def gather(paths: Iterable[str | Path]) -> Results:
    """Read what results folders hold.

    Args:
        paths: folders, searched through but for `*.checkpoints`, hidden folders and links that lead out of them; or
            single JSON files. What is found twice counts once.

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
    """(the field of Results that it belongs to, what the file holds); None where we show nothing of it."""
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
        place = None if scale is None else number("scale", scale)
        return Score(str(init), str(method), place, integer("seed", seed, 0), str(task), number("score", score))

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


def html_report(results: Results) -> str:
    """The page: tables, plots as PNG in it, and how everything was made; no script, nothing from elsewhere."""
    by_parent = groupby(results.drift, lambda one: str(Path(one.name).parent))
    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True}
    environment = Environment(loader=PackageLoader("osrm_peft", ""), **options)
    environment.filters["json"] = lambda made: json.dumps(made, indent=2, ensure_ascii=False)
    return environment.get_template("report_page.html").render(
        summary=results.summary(),
        scores=list(map(_scores_view, results.scores)),
        interference=list(map(_interference_view, results.interference)),
        spectra=list(map(_spectra_view, results.spectra)),
        drift=[_drift_view(parent, list(adapters)) for parent, adapters in by_parent],
        merged=results.merged,
    )


def write_report(paths: Iterable[str | Path], out: str | Path) -> Results:
    """Write the page of what results folders hold, complete or not at all.

    Args:
        paths: as for `gather`.
        out: the page, `*.html`; a page that is there is replaced.

    Raises:
        FileNotFoundError, ValueError: see `gather`; or `out` has another ending.
    """
    if Path(out).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{out}: the page is HTML, name it *.html")
    check_file(out)
    results = gather(paths)
    page = html_report(results)
    with new_file(out) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # a file's name can be any bytes
    return results


def _image(alt: str, plot: Callable[[Any, Path], None], content: Any) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        plot(content, Path(folder, "plot.png"))
        png = Path(folder, "plot.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    return {"alt": alt, "width": width, "height": height, "data": base64.b64encode(png).decode()}


def _scores_view(found: Found[MultiTaskTable]) -> dict[str, Any]:
    table, (header, lines) = found.content, found.content.cells()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row, (init, merge, scale, *cells), best in zip(table.rows, lines, table.best(), strict=True):
        one = {"individual": row["method"] == "individual", "merge": merge, "scale": scale}
        one["cells"] = list(zip(cells, best, strict=True))
        groups.setdefault(init, []).append(one)
    methods = table.swept()
    curves = _image(f"average over tasks against λ: {', '.join(methods)}", plot_scales, table) if methods else None
    seeds = sorted({row["seeds"] for row in table.rows})
    return {"found": found, "header": header[1:], "groups": groups, "curves": curves, "seeds": seeds}


def _interference_view(found: Found[dict[str, dict[str, Interference]]]) -> dict[str, Any]:
    plots = []
    for title, panels in found.content.items():
        tasks = next(iter(panels.values())).tasks
        alt = f"heat maps of {', '.join(panels)}: the adapters of {', '.join(tasks)} on each other's features"
        others = {panel: 100 * one.off_diagonal() for panel, one in panels.items() if len(one.tasks) > 1}
        plots.append({"title": title, "image": _image(alt, plot_interference, panels), "others": others})
    return {"found": found, "plots": plots}


def _spectra_view(found: Found[Spectra]) -> dict[str, Any]:
    labelled = {plot_label(model): matrices for model, matrices in found.content.items()}
    return {"found": found, "image": _image(f"singular values of {', '.join(found.content)}", plot_spectra, labelled)}


def _drift_view(parent: str, adapters: Sequence[Found[list[dict[str, Any]]]]) -> dict[str, Any]:
    names = [Path(one.name).name or one.name for one in adapters]
    curves = {name: [(e["step"], e[DRIFT]) for e in one.content] for name, one in zip(names, adapters, strict=True)}
    last = [one.content[-1] for one in adapters]
    layers = dict.fromkeys(key for entry in last for key in entry if key.startswith(f"{DRIFT}/"))
    rows = {key.removeprefix(f"{DRIFT}/"): [entry.get(key) for entry in last] for key in layers}
    image = _image(f"drift over training steps of {', '.join(names)}", plot_drift, curves)
    return {"parent": parent, "names": names, "last": last, "layers": rows, "image": image, "adapters": adapters}
