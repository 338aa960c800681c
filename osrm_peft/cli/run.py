"""The commands from data to a merge: init, check, run."""

from pathlib import Path
from typing import Annotated

import typer

from osrm_peft.cli.app import JsonOption, app, progress, quiet_libraries, say, show, wrote

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe's YAML file.")]


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="Folder of <task>.csv (.tsv, .jsonl, .parquet), or <task>/train.csv.")],
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    base_model: Annotated[str, typer.Option(help="Hub id, folder, or packaged.")] = "packaged",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier recipe.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a commented recipe for your own data: tasks, columns, labels, metrics and lengths, guessed and shown."""
    from dataclasses import asdict

    from osrm_peft.cli.tables import task_table
    from osrm_peft.pipeline.init import metric_for, write_recipe

    facts = write_recipe(data, out, model=base_model, overwrite=overwrite)
    rows = {name: asdict(fact) | {"metric": metric_for(fact)} for name, fact in facts.items()}
    show(rows, lambda found: [task_table(found)])
    wrote(out, f": look it over, then `osrm-peft check {out}` and `osrm-peft run {out}`")


@app.command()
def check(recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Find every mistake of a recipe and its data before anything is loaded, each with its line."""
    from osrm_peft.pipeline.check import check_recipe
    from osrm_peft.tasks.files import SPLITS

    mistakes, tasks = check_recipe(recipe)
    rows = {
        name: {split: len(part) for split in SPLITS if (part := getattr(task, split))} for name, task in tasks.items()
    }
    facts = {"mistakes": [vars(one) for one in mistakes], "tasks": rows}
    listed = [
        f"{name}: {', '.join(f'{count} {split}' for split, count in one.items())} rows" for name, one in rows.items()
    ]
    show(facts, lambda found: [str(one) for one in mistakes] or listed)
    if mistakes:
        raise ValueError(f"{recipe} has {len(mistakes)} mistake{'' if len(mistakes) == 1 else 's'}")
    say(f"{recipe} has no mistake that can be seen from here: `osrm-peft run {recipe}`")


@app.command()
def run(recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Do all that a recipe asks for: features, adapters, interference, the merge to ship, the report; and a push.

    Each step is made once, and again when its recipe or data has changed. An interrupted run goes on where it stopped.
    """
    from osrm_peft.pipeline.run import run_recipe
    from osrm_peft.training.recipe import Recipe

    quiet_libraries()
    found = Recipe.from_yaml(recipe)
    try:
        selection = run_recipe(found, say=say, progress=progress())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished lies in {found.out}: run the same command to go on") from None
    show(selection, lambda facts: [facts["verdict"]])
    wrote(Path(found.out, "report.html"), f"; the merge is {selection['folder']}")
