"""The demo: a recipe of the packaged tasks, run for one seed or several, and one table over the seeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from osrm_peft.demo.results import report, scores_of
from osrm_peft.evaluation.page import write_report
from osrm_peft.evaluation.plots import plot_scales
from osrm_peft.evaluation.tables import MultiTaskTable
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import command, versions
from osrm_peft.io.places import check_file, check_folder, new_file
from osrm_peft.merging.methods.registry import METHODS
from osrm_peft.pipeline.run import check_steps, read_selections, run_recipe
from osrm_peft.training.recipe import Recipe

FILE = Path(__file__).with_name("recipe.yaml")


def demo_recipe() -> Recipe:
    """The recipe that the demo runs."""
    return Recipe.from_yaml(FILE)


def run_demo(
    out: str | Path,
    *,
    seeds: Sequence[int] = (42,),
    recipe: Recipe | None = None,
    osrm: dict[str, Any] | None = None,
    console: Console | None = None,
    progress: bool = True,
) -> MultiTaskTable:
    """Run the demo's recipe for each seed; write reports, `scores.json` and a plot into `out`, and print the table.

    Every step is made once: an interrupted demo goes on where it stopped.

    Args:
        out: results folder, `seed42/` and so on in it.
        seeds: one set of adapters each; more than one shows mean ± sample standard deviation.
        recipe: in the place of the demo's, with `inits`; its `seed`, `out` and `features` are replaced.
        osrm: OSRMLoraConfig fields of one more kind of adapters, "yours" in the tables.
        progress: show bars.

    Raises:
        FileExistsError: `out` is no demo's folder, or was made with another recipe.
    """
    out, console, recipe = Path(out), console or Console(), recipe or demo_recipe()
    if osrm:
        recipe = replace(recipe, inits={**(recipe.inits or {}), "yours": osrm})
    check_steps(recipe)
    _claim(out, recipe)
    selections = {}
    for seed in seeds:
        place = out / f"seed{seed}"
        one = replace(recipe, seed=seed, out=str(place), features=str(place / "features"))
        run_recipe(one, say=lambda line: console.print(line, markup=False, highlight=False), progress=progress)
        selections[seed] = read_selections(one)
    scores = scores_of(selections)
    table = MultiTaskTable.of(scores)
    default = replace(table, rows=[row for row in table.rows if _is_default(row)])
    plot_scales(table, out / "scales.png")
    made = {"command": command(), "settings": _settings(recipe), "versions": versions()}
    write_json(out / "scores.json", made | {"scores": [asdict(score) for score in scores]})
    with new_file(out / "report.md") as path:
        path.write_text(report(table, default, selections, _settings(recipe), command()), encoding="utf-8")
    write_report([out], out / "report.html")
    spread = "one seed" if len(seeds) == 1 else f"mean ± sample standard deviation over {len(seeds)} seeds"
    console.print(default.terminal(f"Scores in percent, each merge at its paper's λ ({spread})"))
    console.print(f"All scales, the plots and the adapters: {out}/report.md and {out}/report.html", soft_wrap=True)
    return table


def _claim(out: Path, recipe: Recipe) -> None:
    """Make `out` a demo's folder, or check that it is one, with these settings."""
    check_folder(out)
    settings = out / "settings.json"
    for name in (settings.name, "scales.png", "scores.json", "report.md", "report.html"):
        check_file(out / name)
    content = json.loads(json.dumps(_settings(recipe)))
    if settings.is_file():
        if read_object(settings) != content:
            raise FileExistsError(f"{out} was made with other settings ({settings}): name another folder or remove it")
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not a demo's results (no settings.json): name another folder")
    else:
        write_json(settings, content)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in asdict(recipe).items() if key not in ("seed", "features", "out", "osrm")}


def _is_default(row: dict[str, Any]) -> bool:
    """Whether a row has its method's own λ; 1, where features choose the weights."""
    method = row["method"].partition(",")[0].partition(" in ")[0]
    if method not in METHODS or row["scale"] is None:
        return True
    return row["scale"] == (1.0 if "features" in row["method"] else METHODS[method].scale)
