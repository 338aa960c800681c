"""What the experiments show: Markdown, JSON, tidy CSV, plots, and all of it as one HTML page."""

import csv
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from osrm_peft.evaluation.page import write_report
from osrm_peft.evaluation.plots import plot_scales
from osrm_peft.evaluation.tables import AVERAGE, MultiTaskTable, markdown_table
from osrm_peft.hub.privacy import public_name
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import versions
from osrm_peft.io.places import new_file
from osrm_peft.tasks.suites import load_task
from osrm_peft.training.train import PAPER_LORA
from reproduction.experiments import Experiment
from reproduction.graph import Node, ordered
from reproduction.papers import averaged, comparison, gains
from reproduction.suite import OSRM, Suite


def write_outputs(suite: Suite, experiments: Sequence[Experiment], cache: Path, out: Path, command: str) -> None:
    """Write OUT/<experiment>/{scores.json, scores.csv, table.md, plot.png}, OUT/README.md and OUT/report.html.

    Args:
        experiments: whose artefacts are there.
        command: how this was made, for the files.
    """
    made = {"command": command, "settings": _settings(suite), "versions": versions()}
    texts = []
    for one in experiments:
        folder = out / one.name
        folder.mkdir(parents=True, exist_ok=True)
        if one.made is not None:
            shutil.copytree(one.made.path(cache) / "results", folder, dirs_exist_ok=True)
            text = (folder / "table.md").read_text(encoding="utf-8").strip()
        elif one.read is not None:
            text = _values(one, cache, folder, made)
        else:
            text = _scores(one, cache, folder, made)
        text = "\n\n".join([text, *comparison(one.name, {"here": out}, suite.paper)])
        with new_file(folder / "table.md") as path:
            path.write_text(text + "\n", encoding="utf-8")
        plots = [f"![{path.stem}]({one.name}/{path.name})" for path in sorted(folder.glob("*.png"))]
        texts.append("\n\n".join(filter(None, [f"## {one.title}", one.note, text, *plots])))
    nodes = [
        node for node in ordered(one for each in experiments for one in each.needs()) if node.note(cache).is_file()
    ]
    minutes = sum(read_object(node.note(cache))["seconds"] for node in nodes) / 60
    texts += _rates([node for node in nodes if node.kind == "rate"], cache)
    machine = f"{platform.system()} {platform.machine()}, {', '.join(map(' '.join, versions().items()))}"
    how = f"`{command}` ({len(nodes)} artefacts, {minutes:.0f} minutes of work) on {machine}"
    with new_file(out / "README.md") as path:
        seeds = ", ".join(map(str, suite.seeds))
        shown = {name: one for name, one in _settings(suite).items() if name != "experiments"}
        shown["lora"] = PAPER_LORA | suite.lora
        dumped = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None)
        head = (
            f"# The papers' experiments on {public_name(suite.model)}, {len(suite.tasks)} tasks\n\n"
            f"Scores in percent: {_metrics(suite)}. Seeds of the main table: {seeds} (± is the sample standard "
            f"deviation over several), of the other experiments {suite.seeds[0]}: differences of a few points in one "
            f"seed are noise. Settings:\n\n```yaml\n{dumped}```"
        )
        path.write_text("\n\n".join([head, *texts, f"Made by {how}."]) + "\n", encoding="utf-8")
    if any(one.cells or one.made for one in experiments):
        write_report([out], out / "report.html")


def _metrics(suite: Suite) -> str:
    tasks: dict[str, list[str]] = {}
    for name in suite.tasks:
        tasks.setdefault(load_task(suite.suite, name).metric, []).append(name)
    return "; ".join(f"{metric} of {', '.join(names)}" for metric, names in tasks.items())


def _rates(nodes: Sequence[Node], cache: Path) -> list[str]:
    """The learning rates that were chosen, with the scores on held-out training rows."""
    found = [(node.about, json.loads(node.path(cache).read_text(encoding="utf-8"))) for node in nodes]
    if not found:
        return []
    rates = list(found[0][1]["scores"])
    rows = [
        [about["task"], about["init"], f"{one['rate']:g}", *(f"{100 * one['scores'][rate]:.1f}" for rate in rates)]
        for about, one in found
    ]
    table = markdown_table(["task", "adapters", "chosen", *(f"score at {rate}" for rate in rates)], rows)
    return [f"## Learning rates, chosen on held-out training rows of seed {found[0][0]['seed']}\n\n{table}"]


def _scores(experiment: Experiment, cache: Path, folder: Path, made: Mapping[str, Any]) -> str:
    found = list(experiment.scores(cache))
    rows = averaged([score for score, _ in found]) if experiment.averaged else [score for score, _ in found]
    table = MultiTaskTable.of(rows)
    write_json(folder / "scores.json", {"scores": [asdict(score) for score in rows], **made})
    with new_file(folder / "scores.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), "x"])
        writer.writeheader()
        writer.writerows(asdict(score) | {"x": x} for score, x in found)
    if experiment.x == "λ":
        plot_scales(table, folder / "plot.png")
    elif experiment.x:
        _plot_average(experiment, {score.init: x for score, x in found}, table, folder / "plot.png")
    added = [gain for gain in gains(rows) if gain.init.startswith(OSRM)]
    several = " (± of the paired differences)" if len({gain.seed for gain in added}) > 1 else ""
    difference = [f"What OSRM adds, seed by seed{several}:", MultiTaskTable.of(added).markdown()] if added else []
    return "\n\n".join([table.markdown(), *difference])


def _values(experiment: Experiment, cache: Path, folder: Path, made: Mapping[str, Any]) -> str:
    """Layers × columns."""
    assert experiment.read is not None
    values = {key: experiment.read(node.path(cache)) for key, node in experiment.values.items()}
    columns = {f"{experiment.x} = {key}" if experiment.x else key: found for key, found in values.items()}
    layers = list(next(iter(columns.values())))
    write_json(folder / "values.json", {"values": columns, **made})
    with new_file(folder / "values.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "column", "value"])
        writer.writerows([layer, name, found[layer]] for name, found in columns.items() for layer in layers)
    if experiment.x:
        over: dict[str, Callable[..., float]] = {"largest of the layers": max, "mean": fmean, "smallest": min}
        if all(len({*found.values()}) == 1 for found in values.values()):
            over = {"every layer": max}
        lines = {name: [(x, of(found.values())) for x, found in values.items()] for name, of in over.items()}
    else:
        lines = {name: list(enumerate(found[layer] for layer in layers)) for name, found in columns.items()}
    title = experiment.title.partition(" (")[0]
    _plot(lines, folder / "plot.png", xlabel=experiment.x or "layer, in model order", ylabel=title)
    rows = [[layer, *(_shown(found[layer]) for found in columns.values())] for layer in layers]
    return markdown_table(["layer", *columns], rows)


def _plot_average(experiment: Experiment, x_of: Mapping[str, Any], table: MultiTaskTable, path: Path) -> None:
    """The average against x, a line a kind of adapter and method."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        name = f"{row['init'].partition(',')[0]}, {row['method']}"
        lines.setdefault(name, []).append((x_of[row["init"]], row["scores"][AVERAGE]))
    scale = "log" if experiment.x == "k" else "linear"
    _plot(lines, path, xlabel=experiment.x, ylabel="average over tasks [%]", xscale=scale)


def _plot(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, **axes_options: Any) -> None:
    """{name: points (x, y)}, a line each; write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(**axes_options)
    xs = sorted({x for points in lines.values() for x, _ in points})
    if len(xs) <= 12:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _settings(suite: Suite) -> dict[str, Any]:
    return json.loads(
        json.dumps({name: value for name, value in asdict(suite).items() if name not in ("paper", "tuned")})
    )
