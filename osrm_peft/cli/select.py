"""The command around choosing a merge: select."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from osrm_peft.cli.app import JsonOption, app, pairs, progress, quiet_libraries, say, show, sources, wrote
from osrm_peft.io.yaml import parse_yaml

if TYPE_CHECKING:
    from osrm_peft.selection.selection import Selection

_SUITE = "Whose rows score them: packaged, glue, files:FOLDER, or a recipe's YAML. Default: the data of their training."
_SCORE = "A command that prints a score; it gets {model}, {task} and {rows}. Default: each task's metric."


@app.command()
def select(
    adapters: Annotated[list[str], typer.Argument(help="Adapters, as TASK=FOLDER or TASK=user/name (or just FOLDER).")],
    suite: Annotated[str | None, typer.Option(help=_SUITE)] = None,
    candidates: Annotated[
        Path | None, typer.Option(help="YAML list of merges; a list of values is a sweep. Default: our best methods.")
    ] = None,
    score: Annotated[str | None, typer.Option(help=_SCORE)] = None,
    rule: Annotated[
        Literal["mean", "relative", "worst"],
        typer.Option(help="Mean over tasks; mean of score / individual score; or the least of these."),
    ] = "mean",
    rows: Annotated[int, typer.Option(help="Rows a task to choose on, at most; as many are kept for the test.")] = 512,
    rank: Annotated[str | None, typer.Option(help="Largest rank of the result, or serving. Default: exact.")] = None,
    features: Annotated[list[str] | None, typer.Option(help="TASK=FILE, for weights by features; repeat it.")] = None,
    gram: Annotated[list[str] | None, typer.Option(help="TASK=FILE, for regmean; repeat it.")] = None,
    fisher: Annotated[list[str] | None, typer.Option(help="TASK=FILE, for fisher; repeat it.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model, where the adapters name it differently.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row is cut to. Default: as in training.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of rows and of the resamples.")] = 0,
    all_rows: Annotated[bool, typer.Option("--all-rows", help="Score every candidate on all rows.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the ranked table and the winner.")] = Path("results/selection"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another selection of ours.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which merge to ship: merge by many methods and scales, score on held-out rows, rank, keep the winner.

    An interrupted selection goes on where it stopped. Half of the validation rows, or the tasks' own test rows, have no
    say in the choice; the last lines are of these.
    """
    from osrm_peft.evaluation.subjects import LENGTH, subjects
    from osrm_peft.selection.select import select_merge
    from osrm_peft.tasks.suites import load_task
    from osrm_peft.training.recipe import suite_of

    quiet_libraries()
    named = sources(adapters)
    found = {name: subjects(source, base_model)[0] for name, source in named.items()}
    suites = {name: suite_of(suite) if suite else one.suite or "packaged" for name, one in found.items()}
    command = None if score is None else _command(score, base_model, next(iter(found.values())).folder)
    if max_length is None:
        max_length = max(one.max_length or 0 for one in found.values()) or LENGTH
    selection = select_merge(
        named, candidates, command, tasks={name: load_task(one, name) for name, one in suites.items()},
        base_model=base_model, rule=rule, rows=rows, features=pairs(features) or None, gram=pairs(gram) or None,
        fisher=pairs(fisher) or None, max_length=max_length, seed=seed,
        rank=None if rank is None else parse_yaml(rank), halving=not all_rows, out=out, overwrite=overwrite,
        progress=progress(),
    )  # fmt: skip
    print_selection(selection, out)


def _command(score: str, base_model: str | None, adapter: Path) -> Any:
    """The user's command, with the tokenizer that goes into each model's folder."""
    from osrm_peft.adapters.load import load_adapter
    from osrm_peft.models.loading import load_tokenizer
    from osrm_peft.selection.command import CommandScore

    return CommandScore(score, load_tokenizer(base_model or load_adapter(adapter).base_model or ""))


def print_selection(selection: "Selection", out: Path) -> None:
    """Print the tables, the answer, and where it lies."""
    show(selection.to_dict(), lambda facts: selection.terminal())
    say(selection.verdict())
    wrote(out / "selection.json", f", {out / 'selection.md'}, {out / 'winner'}")
