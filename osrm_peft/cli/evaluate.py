"""The command that scores: evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from osrm_peft.cli.app import JsonOption, TaskOption, app, progress, quiet_libraries, say, show, wrote

if TYPE_CHECKING:
    from osrm_peft.evaluation.subjects import Subject
    from osrm_peft.tasks.task import Task


@app.command()
def evaluate(
    adapter: Annotated[str, typer.Argument(help="An adapter, a merge, a sweep's folder or a full model; or a Hub id.")],
    suite: Annotated[
        str | None,
        typer.Option(
            help="packaged, glue, files:FOLDER, or a recipe's YAML. Default: the data of its training, else packaged."
        ),
    ] = None,
    task: TaskOption = None,
    base_model: Annotated[str | None, typer.Option(help="Default: the one the adapter names.")] = None,
    rows: Annotated[int | None, typer.Option(help="Validation rows a task. Default: all.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of tasks in words, in place of their own: exact_match, rouge_l, …")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a row is cut to. Default: as in training, else 128.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Put the scores into the folder's manifest and card.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scores on other rows.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Score an adapter on its task, a merge with each task's head, every scale of a sweep, or a full model.

    Under `accelerate launch … -m osrm_peft` the processes share the rows.
    """
    from osrm_peft.checks import integer
    from osrm_peft.distributed import start
    from osrm_peft.evaluation.subjects import LENGTH, subjects
    from osrm_peft.evaluation.tables import MultiTaskTable, Score
    from osrm_peft.hub.card import record_scores
    from osrm_peft.io.places import check_file
    from osrm_peft.training.recipe import suite_of

    quiet_libraries()
    if max_length is not None:
        integer("max_length", max_length, 1)
    settings = {"adapter": adapter, "suite": suite, "model": base_model, "rows": rows, "max_length": max_length}
    settings |= {} if metric is None else {"metric": metric}
    if out is not None:
        _check_scores_file(check_file(out), settings, overwrite)
    found = subjects(adapter, base_model)
    chosen = suite_of(suite) if suite is not None else found[0].suite or "packaged"
    named = chosen if isinstance(chosen, str) else "own data"
    tasks = _tasks(found[0], chosen, task, rows, metric)
    records = _records(tasks, named)
    for subject in found if save else ():
        _check_folder(subject, records, adapter, overwrite)
    scores, processes = [], start()
    for subject in found:
        records = _measured(
            subject, tasks, records, (subject.max_length or LENGTH) if max_length is None else max_length
        )
        scale = subject.manifest.get("scale") if "method" in subject.manifest else None
        scores += [Score(subject.name, subject.method, scale, 0, one["task"], one["value"]) for one in records]
        if save and processes.is_main_process:
            record_scores(subject.folder, records)
            say(f"put the scores into {subject.folder}")
    table = MultiTaskTable.of(scores)
    show(
        [{"name": one.init, "task": one.task, "scale": one.scale, "score": one.score} for one in scores],
        lambda facts: [table.terminal(f"Scores in percent on {named}")],
    )
    if out is not None and processes.is_main_process:
        _write_scores(out, found, scores, records, settings)


def _write_scores(
    out: Path, found: "list[Subject]", scores: list[Any], records: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    from osrm_peft.io.json import write_json
    from osrm_peft.io.manifest import versions

    by_name = {one.name: {score.task: score.score for score in scores if score.init == one.name} for one in found}
    content = {"scores": by_name[found[0].name] if len(found) == 1 else by_name, "settings": settings}
    names = ("metric", "rows", "split", "generation")
    content["tasks"] = {one["task"]: {name: one[name] for name in names if name in one} for one in records}
    write_json(out, content | {"manifest": dict(found[0].manifest), "versions": versions()})
    wrote(out)


def _tasks(
    subject: "Subject", suite: Any, names: list[str] | None, rows: int | None, metric: str | None
) -> "dict[str, Task]":
    from osrm_peft.tasks.suites import load_task
    from osrm_peft.tasks.text import TextTask

    names = names or subject.tasks
    if names is None:
        raise ValueError(f"{subject.folder} does not say which task it is for: name it with --task")
    tasks = {name: load_task(suite, name).sample(validation=rows) for name in names}
    if metric is None:
        return tasks
    classes = [name for name, one in tasks.items() if not isinstance(one, TextTask)]
    if classes:
        raise ValueError(f"--metric is of tasks in words, and {classes[0]!r} has classes: leave it out")
    return {name: one.measured_by(metric) for name, one in tasks.items() if isinstance(one, TextTask)}


def _check_folder(subject: "Subject", records: list[dict[str, Any]], source: str, overwrite: bool) -> None:
    """Refuse a folder whose manifest cannot take these scores."""
    from osrm_peft.hub.card import check_own_files
    from osrm_peft.io.manifest import MANIFEST

    if not subject.manifest or not Path(source).is_dir():
        raise ValueError(f"--save writes the scores into a folder of ours, with {MANIFEST}; {source} is none")
    check_own_files(subject.folder)
    _check_scores(dict(subject.manifest), records, str(subject.folder), overwrite)


def _measured(
    subject: "Subject", tasks: "dict[str, Task]", records: list[dict[str, Any]], max_length: int
) -> list[dict[str, Any]]:
    """The records with their values, and with how completions were written."""
    from osrm_peft.devices import local_device
    from osrm_peft.evaluation.evaluate import evaluate_task
    from osrm_peft.evaluation.text import written_by
    from osrm_peft.tasks.text import TextTask

    found = []
    for record in records:
        name, task = record["task"], tasks[record["task"]]
        with_task, tokenizer = subject.load(name, in_words=isinstance(task, TextTask))
        on_device: Any = with_task.to(local_device())  # type: ignore[arg-type]
        value = evaluate_task(on_device, task, tokenizer, max_length=max_length, distributed=True, progress=progress())
        found.append(record | {"value": value} | written_by(task, tokenizer))
    return found


def _records(tasks: "dict[str, Task]", suite: str) -> list[dict[str, Any]]:
    """What a manifest says of each task's score, but for its value."""
    dataset = "nyu-mll/glue" if suite == "glue" else None
    return [
        {"task": name, "metric": task.metric, "split": "validation", "rows": len(task.validation), "dataset": dataset}
        for name, task in tasks.items()
    ]


def _check_scores_file(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Refuse a file that holds anything but scores of the same evaluation."""
    from osrm_peft.io.json import read_object

    if out.exists() and not overwrite:
        earlier = read_object(out).get("settings")
        if earlier != settings:
            what = f"scores of another evaluation ({earlier})" if isinstance(earlier, dict) else "no scores of ours"
            raise FileExistsError(f"{out} holds {what}: name another file, or replace it with --overwrite")


def _check_scores(manifest: dict[str, Any], records: list[dict[str, Any]], folder: str, overwrite: bool) -> None:
    """Refuse to put scores in the place of others, which are on other rows or by another metric."""
    earlier = {score["task"]: score for score in manifest.get("scores") or []}
    for record in records if not overwrite else ():
        score = earlier.get(record["task"], record)
        differ = [name for name in ("metric", "split", "rows", "dataset") if score.get(name) != record[name]]
        if differ:
            before, now = score.get(differ[0]), record[differ[0]]
            raise FileExistsError(
                f"{folder} has a score of {record['task']!r} with {differ[0]}={before!r}, this one has {now!r}: "
                "--overwrite puts it in its place"
            )
