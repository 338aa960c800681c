"""One HTML page of results folders, which needs no other file."""

import base64
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from osrm_peft.evaluation.interference import Interference
from osrm_peft.evaluation.plots import plot_drift, plot_interference, plot_label, plot_scales
from osrm_peft.evaluation.results import DRIFT, Found, Results, gather
from osrm_peft.evaluation.spectra import Spectra, plot_spectra
from osrm_peft.evaluation.tables import MultiTaskTable
from osrm_peft.io.places import check_file, new_file


def html_report(results: Results) -> str:
    """The page: tables, plots as embedded PNG, settings and versions; no script, nothing loaded from elsewhere."""
    by_parent = groupby(results.drift, lambda one: str(Path(one.name).parent))
    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True}
    environment = Environment(loader=PackageLoader("osrm_peft.evaluation", "."), **options)
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
        out: the page, `*.html`; an earlier page is replaced.

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
        line = {"individual": row["method"] == "individual", "merge": merge, "scale": scale}
        line["cells"] = list(zip(cells, best, strict=True))
        groups.setdefault(init, []).append(line)
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
