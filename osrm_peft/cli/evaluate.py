"""The command that scores: evaluate."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from osrm_peft.cli.app import JsonOption, TaskOption, app, progress, quiet_libraries, say, show, wrote

if TYPE_CHECKING:
    from osrm_peft.evaluation.subjects import Subject
    from osrm_peft.tasks.suites import Suite
    from osrm_peft.tasks.task import Task


HarnessOption = Annotated[
    list[str] | None,
    typer.Option(help="Score by lm-eval: packaged-text, a task of --suite, or a task of lm-eval's; repeat it."),
]


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
    harness: HarnessOption = None,
    shots: Annotated[int | None, typer.Option(help="Few-shot examples, with --harness. Default: the task's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: 64, with --harness 8.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put prompts through the chat template, with --harness.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score an adapter on its task, a merge with each task's head, every scale of a sweep, or a full model.

    Under `accelerate launch … -m osrm_peft` the processes share the rows; lm-eval scores in one process.
    """
    from osrm_peft.checks import integer
    from osrm_peft.evaluation.subjects import subjects
    from osrm_peft.io.places import check_file
    from osrm_peft.training.recipe import suite_of

    quiet_libraries()
    for name, value, least in (("max_length", max_length, 1), ("batch_size", batch_size, 1), ("shots", shots, 0)):
        if value is not None:
            integer(name, value, least)
    settings: dict[str, Any] = {"adapter": adapter, "suite": suite, "model": base_model, "rows": rows}
    settings |= {"max_length": max_length} | ({} if metric is None else {"metric": metric})
    settings |= {"harness": harness, "shots": shots, "chat_template": chat_template} if harness else {}
    if out is not None:
        _check_scores_file(check_file(out), settings, overwrite)
    if harness and (task or metric):
        raise ValueError("--harness names the tasks, and these their metrics: leave --task and --metric out")
    if not harness and (shots is not None or chat_template):
        raise ValueError("--shots and --chat-template are of lm-eval: name its tasks with --harness")
    found = subjects(adapter, base_model)
    chosen, places = None if suite is None else suite_of(suite), _Places(out, save, overwrite, settings)
    if harness:
        _by_harness(found, harness, chosen, batch_size, places)
    else:
        _by_us(found, task, chosen, batch_size, places)


@dataclass(frozen=True)
class _Places:
    """Where scores go: `--out`, `--save`, `--overwrite`; and what was asked for."""

    out: Path | None
    save: bool
    overwrite: bool
    settings: dict[str, Any]


def _by_us(
    found: "list[Subject]", names: list[str] | None, suite: "Suite | None", batch_size: int | None, places: _Places
) -> None:
    from osrm_peft.distributed import start
    from osrm_peft.evaluation.subjects import LENGTH
    from osrm_peft.evaluation.tables import MultiTaskTable, Score
    from osrm_peft.hub.card import record_scores

    settings, save = places.settings, places.save
    chosen = suite if suite is not None else found[0].suite or "packaged"
    named = chosen if isinstance(chosen, str) else "own data"
    tasks = _tasks(found[0], chosen, names, settings["rows"], settings.get("metric"))
    records = _records(tasks, named)
    for subject in found if save else ():
        _check_folder(subject, settings["adapter"])
        _check_scores(dict(subject.manifest), records, str(subject.folder), places.overwrite)
    scores, processes = [], start()
    for subject in found:
        length = settings["max_length"] or subject.max_length or LENGTH
        records = _measured(subject, tasks, records, max_length=length, batch_size=batch_size or 64)
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
    if places.out is not None and processes.is_main_process:
        by_name = {one.name: {score.task: score.score for score in scores if score.init == one.name} for one in found}
        _write_scores(places.out, found, by_name, records, settings)


def _by_harness(
    found: "list[Subject]", asked: list[str], suite: "Suite | None", batch_size: int | None, places: _Places
) -> None:
    from osrm_peft.checks import integer
    from osrm_peft.cli.harness import harness_records, harness_table, harness_tasks, scores_of
    from osrm_peft.distributed import start
    from osrm_peft.evaluation.harness import BATCH
    from osrm_peft.evaluation.scored import main_of_harness
    from osrm_peft.hub.card import record_scores

    settings = places.settings
    if settings["rows"] is not None:
        integer("rows", settings["rows"], 1)
    if start().num_processes > 1:
        raise ValueError("lm-eval scores in one process: start osrm-peft evaluate without accelerate launch")
    tasks = harness_tasks(found[0], asked, suite)
    names = {one if isinstance(one, str) else one.name for one in tasks}
    for subject in found if places.save else ():
        _check_folder(subject, settings["adapter"])
        _check_harness_scores(subject, names, settings, places.overwrite)
    options = {name: settings[name] for name in ("rows", "shots", "max_length", "chat_template")}
    options["batch_size"] = batch_size or BATCH
    records = {one.name: harness_records(scores_of(one, tasks, **options)) for one in found}
    show(
        [{"name": name} | one for name, of_one in records.items() for one in of_one],
        lambda facts: [harness_table(facts)],
    )
    if places.out is not None:
        main = {name: main_of_harness(of_one) for name, of_one in records.items()}
        by_name = {name: {one["task"]: one["value"] for one in of_one} for name, of_one in main.items()}
        _write_scores(places.out, found, by_name, main[found[0].name], settings, harness=records)
    for subject in found if places.save else ():
        _check_harness_scores(subject, {one["task"] for one in records[subject.name]}, settings, places.overwrite)
        record_scores(subject.folder, records[subject.name])
        say(f"put the scores into {subject.folder}")


def _write_scores(
    out: Path,
    found: "list[Subject]",
    scores: dict[str, dict[str, float]],
    records: list[dict[str, Any]],
    settings: dict[str, Any],
    **more: Any,
) -> None:
    from osrm_peft.evaluation.scored import metric_of
    from osrm_peft.io.json import write_json
    from osrm_peft.io.manifest import versions

    content = {"scores": scores[found[0].name] if len(found) == 1 else scores, "settings": settings}
    content["tasks"] = {
        one["task"]: {
            "metric": metric_of(one),
            **{name: one[name] for name in ("rows", "split", "generation") if name in one},
        }
        for one in records
    }
    write_json(out, content | {"manifest": dict(found[0].manifest), "versions": versions(), **more})
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


def _check_folder(subject: "Subject", source: str) -> None:
    """Refuse a folder whose manifest cannot take scores."""
    from osrm_peft.hub.card import check_own_files
    from osrm_peft.io.manifest import MANIFEST

    if not subject.manifest or not Path(source).is_dir():
        raise ValueError(f"--save writes the scores into a folder of ours, with {MANIFEST}; {source} is none")
    check_own_files(subject.folder)


def _measured(
    subject: "Subject", tasks: "dict[str, Task]", records: list[dict[str, Any]], **options: int
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
        value = evaluate_task(on_device, task, tokenizer, **options, distributed=True, progress=progress())
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
    earlier = {score["task"]: score for score in manifest.get("scores") or [] if not score.get("harness")}
    for record in records if not overwrite else ():
        score = earlier.get(record["task"], record)
        differ = [name for name in ("metric", "split", "rows", "dataset") if score.get(name) != record[name]]
        if differ:
            before, now = score.get(differ[0]), record[differ[0]]
            raise FileExistsError(
                f"{folder} has a score of {record['task']!r} with {differ[0]}={before!r}, this one has {now!r}: "
                "--overwrite puts it in its place"
            )


def _check_harness_scores(subject: "Subject", names: set[str], settings: dict[str, Any], overwrite: bool) -> None:
    """Refuse to put the harness' scores in the place of others, which were made with other settings."""
    now = {"limit": settings["rows"], **{name: settings[name] for name in ("shots", "max_length", "chat_template")}}
    for score in subject.manifest.get("scores") or [] if not overwrite else ():
        made = score.get("harness") if score["task"] in names else None
        differ = [name for name, value in now.items() if made and made.get(name) != value]
        if made and differ:
            raise FileExistsError(
                f"{subject.folder} has a score of {score['task']!r} by lm-eval with {differ[0]} {made.get(differ[0])}, "
                f"this one has {now[differ[0]]}: --overwrite puts it in its place"
            )
