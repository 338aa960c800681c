"""One HTML page of results folders, which needs no other file."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from osrm_peft.evaluation import answer
from osrm_peft.evaluation.interference import Interference
from osrm_peft.evaluation.page_table import Links, adapter_rows, curves, table_view
from osrm_peft.evaluation.plots import draw_drift, draw_interference, draw_scales, plot_label, svg
from osrm_peft.evaluation.results import DRIFT, Found, Results, gather
from osrm_peft.evaluation.scored import Combined, adapters_alone, combine
from osrm_peft.evaluation.spectra import Spectra, draw_spectra
from osrm_peft.evaluation.tables import MultiTaskTable
from osrm_peft.io.places import check_file, new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def html_report(results: Results, folder: Path | None = None) -> str:
    """The page: the answer, tables, plots as embedded SVG, settings and versions; nothing loaded from elsewhere.

    The page's one script sorts and filters its tables; it is allowed by its hash, and the page is complete without it.

    Args:
        folder: where the page will lie; folders beside it, or beside that folder, are linked. None: no links.
    """
    by_parent = groupby(results.drift, lambda one: str(Path(one.name).parent))
    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True}
    environment = Environment(loader=PackageLoader("osrm_peft.evaluation", "."), **options)
    environment.filters["json"] = lambda made: json.dumps(made, indent=2, ensure_ascii=False)
    environment.filters["breakable"] = lambda name: Markup("_<wbr>").join(str(name).split("_"))
    script = Path(__file__).with_name("report_page.js").read_text(encoding="utf-8")
    links, tables, lines = Links(folder), combine(results.lines()), results.lines()
    answers = [answer.of_choice(found.content) for found in results.selections]
    if not answers:
        answers = [one for one in [answer.of_scores(table) for table in tables[:1]] if one is not None]
    return environment.get_template("report_page.html").render(
        summary=results.summary(),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        links=links,
        answers=answers,
        tables=[_table_view(table, links) for table in tables],
        adapters=adapter_rows(adapters_alone(lines)),
        scores=list(map(_scores_view, results.scores)),
        made_of=[found for kind in (results.selections, results.evaluations) for found in kind],
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
    page = html_report(results, Path(out).parent)
    with new_file(out) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # a file's name can be any bytes
    return results


def _image(alt: str, draw: Callable[[], "Figure"]) -> dict[str, Any]:
    image = svg(draw)
    sizes = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"|height="([\d.]+)pt".*?width="([\d.]+)pt"', image)
    if sizes is None:
        raise ValueError("matplotlib wrote an SVG without a size")
    width, height = (sizes[1], sizes[2]) if sizes[1] else (sizes[4], sizes[3])
    data = base64.b64encode(image.encode()).decode()
    return {"alt": alt, "width": round(float(width) * 4 / 3), "height": round(float(height) * 4 / 3), "data": data}


def _table_view(table: Combined, links: Links) -> dict[str, Any]:
    found = curves(table)
    alt = f"average over tasks against λ: {', '.join(found)}"
    plot = _image(alt, partial(draw_scales, found)) if found else None
    return table_view(table, links) | {"curves": plot}


def _scores_view(found: Found[MultiTaskTable]) -> dict[str, Any]:
    table, (header, lines) = found.content, found.content.cells()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row, (init, merge, scale, *cells), best in zip(table.rows, lines, table.best(), strict=True):
        line = {"individual": row["method"] == "individual", "merge": merge, "scale": scale}
        line["cells"] = list(zip(cells, best, strict=True))
        groups.setdefault(init, []).append(line)
    seeds = sorted({row["seeds"] for row in table.rows})
    return {"found": found, "header": header[1:], "groups": groups, "seeds": seeds}


def _interference_view(found: Found[dict[str, dict[str, Interference]]]) -> dict[str, Any]:
    plots = []
    for title, panels in found.content.items():
        tasks = next(iter(panels.values())).tasks
        alt = f"heat maps of {', '.join(panels)}: the adapters of {', '.join(tasks)} on each other's features"
        if any(one.overlap_a for one in panels.values()):
            alt += ", and what they share of A and B"
        others = {panel: 100 * one.off_diagonal() for panel, one in panels.items() if one.layers and len(one.tasks) > 1}
        verdicts = {panel: one.verdict() for panel, one in panels.items() if one.verdict()}
        image = _image(alt, partial(draw_interference, panels))
        plots.append({"title": title, "image": image, "others": others, "verdicts": verdicts})
    return {"found": found, "plots": plots}


def _spectra_view(found: Found[Spectra]) -> dict[str, Any]:
    labelled = {plot_label(model): matrices for model, matrices in found.content.items()}
    alt = f"singular values of {', '.join(found.content)}"
    return {"found": found, "image": _image(alt, partial(draw_spectra, labelled))}


def _drift_view(parent: str, adapters: Sequence[Found[list[dict[str, Any]]]]) -> dict[str, Any]:
    names = [Path(one.name).name or one.name for one in adapters]
    curves = {name: [(e["step"], e[DRIFT]) for e in one.content] for name, one in zip(names, adapters, strict=True)}
    last = [one.content[-1] for one in adapters]
    layers = dict.fromkeys(key for entry in last for key in entry if key.startswith(f"{DRIFT}/"))
    rows = {key.removeprefix(f"{DRIFT}/"): [entry.get(key) for entry in last] for key in layers}
    image = _image(f"drift over training steps of {', '.join(names)}", partial(draw_drift, curves))
    return {"parent": parent, "names": names, "last": last, "layers": rows, "image": image, "adapters": adapters}
