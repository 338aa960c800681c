"""The command `osrm-peft`: a thin skin over the library's functions."""

import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from osrm_peft.checks import is_fault
from osrm_peft.cli import checkpoints, features, merge, methods, report  # noqa: F401 (their commands)
from osrm_peft.cli.app import (
    ConfigOption,
    JsonOption,
    SuiteOption,
    TaskOption,
    app,
    as_typed,
    chosen,
    console,
    escape_messages,
    one_line,
    progress,
    say,
    show,
    values,
    wrote,
)

if TYPE_CHECKING:
    from osrm_peft.tasks.task import Task


@app.command()
def train(
    config: ConfigOption,
    task: TaskOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the adapters: OUT/<task>.")] = Path("results/adapters"),
    overwrite: bool = False,
) -> None:
    """Train one adapter a task. Several processes: `accelerate launch … -m osrm_peft train`, the same options."""
    from osrm_peft.io.manifest import read_manifest
    from osrm_peft.io.places import check_folder
    from osrm_peft.training.recipe import Recipe

    recipe = Recipe.from_yaml(config)
    names = chosen(task, recipe.task_names())
    for name in names:
        check_folder(out / name)
    for name in names:
        if read_manifest(out / name).get("kind") == "adapter" and not overwrite:
            say(f"{out / name} is there already (--overwrite makes it anew)")
            continue
        wrote(recipe.train(name, out / name, overwrite=overwrite, progress=progress()))


@app.command()
def evaluate(
    adapter: Annotated[str, typer.Argument(help="A merged folder, or one adapter's folder or Hub id.")],
    suite: SuiteOption = "packaged",
    task: TaskOption = None,
    model: Annotated[str | None, typer.Option("--base-model", help="Default: the one the adapter names.")] = None,
    rows: Annotated[int | None, typer.Option(help="Validation rows a task. Default: all.")] = None,
    max_length: int = 128,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Put the scores into the folder's manifest and card.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scores on other rows.")] = False,
) -> None:
    """Score an adapter on a suite's tasks: a merged one with each task's head, a single one on its own task.

    Under `accelerate launch … -m osrm_peft` the processes share the rows.
    """
    from osrm_peft.distributed import local_device, start
    from osrm_peft.evaluation.evaluate import evaluate_task
    from osrm_peft.evaluation.tables import MultiTaskTable, Score
    from osrm_peft.hub.card import check_own_files, model_card, record_scores
    from osrm_peft.hub.sources import local_folder
    from osrm_peft.io.json import write_json
    from osrm_peft.io.manifest import MANIFEST, read_manifest, versions
    from osrm_peft.io.places import check_file
    from osrm_peft.models.loading import load_tokenizer
    from osrm_peft.tasks.suites import load_task

    settings = {"adapter": adapter, "suite": suite, "model": model, "rows": rows, "max_length": max_length}
    if out is not None:
        _check_scores_file(check_file(out), settings, overwrite)
    folder = local_folder(adapter, ["*.json", "*.safetensors", "heads/*.safetensors"])
    manifest = read_manifest(folder)
    model_card(manifest)  # a damaged manifest shows here
    merged = _is_merge(manifest)
    load, names = _loader(folder, manifest, model), task or _tasks_of(manifest)
    if names is None:
        raise ValueError(f"{adapter} does not say which task it is for: name it with --task")
    if save and (not manifest or not Path(adapter).is_dir()):
        raise ValueError(f"--save writes the scores into a folder of ours, with {MANIFEST}; {adapter} is none")
    tasks = {name: load_task(suite, name).sample(validation=rows) for name in names}
    records = _records(tasks, suite)
    if save:
        check_own_files(folder)
        _check_scores(manifest, records, adapter, overwrite)
    scores, processes = [], start()
    for record, (name, rows_of_task) in zip(records, tasks.items(), strict=True):
        base, with_task = load(name)
        tokenizer, with_task = load_tokenizer(base), with_task.to(local_device())
        value = evaluate_task(with_task, rows_of_task, tokenizer, max_length=max_length, distributed=True)
        method, scale = (str(manifest.get("method")), manifest.get("scale")) if merged else ("individual", None)
        scores.append(Score(Path(adapter).name, method, scale, 0, name, value))
        record["value"] = value
    console.print(MultiTaskTable.of(scores).terminal(f"Scores in percent on {suite}"))
    if save and processes.is_main_process:
        record_scores(folder, records)
    if out is not None and processes.is_main_process:
        content = {"scores": {score.task: score.score for score in scores}, "settings": settings}
        write_json(out, content | {"manifest": manifest, "versions": versions()})


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


def _is_merge(manifest: dict[str, Any]) -> bool:
    """Whether the folder of this manifest holds a merge, with a head for each task."""
    return manifest.get("kind") in ("merged", "emr") and isinstance(manifest.get("inputs"), dict)


def _tasks_of(manifest: dict[str, Any]) -> list[str] | None:
    """The tasks that a manifest names; None for none."""
    if _is_merge(manifest):
        return list(manifest["inputs"])
    return [manifest["task"]] if "task" in manifest else None


def _loader(folder: Path, manifest: dict[str, Any], model: str | None) -> Callable[[str], tuple[str, Any]]:
    """The function from a task to (name of the base model, the model with the adapter and the task's head)."""
    from osrm_peft.adapters.load import load_adapter
    from osrm_peft.merging.emr_adapter import EMRAdapter

    masked = EMRAdapter.from_pretrained(folder) if manifest.get("kind") == "emr" else None

    def load(task: str) -> tuple[str, Any]:
        base = model or manifest.get("base_model")
        if masked is not None:
            return base or "", masked.load(base or "", task)
        adapter = load_adapter(folder, task=task if _is_merge(manifest) else None)
        base = base or adapter.base_model or ""
        return base, adapter.attach(base)

    return load


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An adapter, a merge (adapter or model), or a features file.")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Make a public repository. Default: private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there. Default: main.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Push to the Hub, with a model card, as one commit. The token is that of `hf auth login`, or HF_TOKEN."""
    from osrm_peft.hub.push import push_to_hub

    address = push_to_hub(folder, repo, private=not public, revision=revision, create_pr=pr, commit_message=message)
    say(f"pushed {folder} to {address}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results/demo"),
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Sets of adapters; more than one shows the spread.")] = 1,
    osrm: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of OSRMLoraConfig, for the OSRM adapters.")] = None,
) -> None:
    """Everything once, on a real small model and six real tasks that need no network."""
    import warnings

    import transformers

    from osrm_peft.demo.run import OSRM, run_demo

    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own, about its own names
    warnings.filterwarnings("ignore", module=r"osrm_peft\.merging")  # it merges with every method on purpose
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run_demo(out, seeds=range(42, 42 + seeds), osrm=OSRM | values(osrm), console=console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished lies in {out}: run the same command to go on") from None


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Print versions and machine, for an issue. No path, name of a user or address is among them."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from osrm_peft.io.manifest import versions

    facts: dict[str, object] = dict(versions())
    for name in ("deepspeed", "trl", "bitsandbytes"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts |= {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPUs": f"{os.cpu_count()}, {torch.get_num_threads()} threads for torch",
        "GPUs": ", ".join(torch.cuda.get_device_name(place) for place in range(cuda)) or "none",
    }
    show(facts, lambda facts: [f"- {name}: {value}" for name, value in facts.items()])


_REPORT = "this is a fault in osrm_peft: please report it, with what `osrm-peft env` prints"


def main() -> None:
    """Run the command; an error is one line, not a traceback. Exit codes: docs/reference/cli.md."""
    escape_messages()
    try:
        app()
    except BaseException as error:
        if not is_fault(error):
            raise
        Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(told(error))}", soft_wrap=True)
        sys.exit(2 if _is_mistake(error) or _is_out_of_memory(error) else 1)


def _is_out_of_memory(error: BaseException) -> bool:
    words = "out of memory|can't allocate memory|not enough memory"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def _is_mistake(error: BaseException) -> bool:
    """Whether the error is of what was asked for, or of the machine, and not a fault in us."""
    foreseen = isinstance(error, ValueError | TypeError | OSError | ImportError)
    return foreseen and type(error).__name__ != "LinAlgError"


def told(error: BaseException) -> str:
    """The error on one line, with the way out; an error that no check foresaw also names the command and our line."""
    text = one_line(error) or type(error).__name__
    if _is_out_of_memory(error):
        return f"{_command()}: out of memory ({text[:200]}): free some, or ask for less (fewer rows, a lower rank)"
    if _is_mistake(error):
        return as_typed(text)
    package = Path(__file__).parents[1]
    ours = [line for line in traceback.extract_tb(error.__traceback__) if Path(line.filename).is_relative_to(package)]
    place = f" at {Path(ours[-1].filename).relative_to(package)}:{ours[-1].lineno}" if ours else ""
    return f"{_command()}: {type(error).__name__}{place}: {text[:500]}; {_REPORT}"


def _command() -> str:
    return one_line(" ".join(["osrm-peft", *sys.argv[1:2]]))
