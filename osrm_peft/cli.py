"""The command `osrm-peft`: a thin skin over the library's functions."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train LoRA adapters so that they can be merged (OSRM), and merge them (LoRE-Merging and the baselines).",
)
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)  # soft: a path is one word, to copy

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="A recipe, see recipes/configs/.")]
TaskOption = Annotated[list[str] | None, typer.Option("--task", "-t", help="A task; repeat it. Default: all.")]
SuiteOption = Annotated[str, typer.Option(help="packaged, glue, or jsonl:FOLDER.")]


@app.command()
def features(config: ConfigOption, task: TaskOption = None, overwrite: bool = False) -> None:
    """Collect the tasks' features on the pre-trained model: one file a task, in the recipe's `features` folder."""
    from osrm_peft.recipe import Recipe

    recipe = Recipe.from_yaml(config)
    for name in _chosen(task, recipe.task_names()):
        path = recipe.features_file(name)
        if path.exists() and not overwrite:
            _say(f"{path} is there already (--overwrite makes it anew)")
            continue
        recipe.collect(name).save(path)
        _say(f"wrote {path}")


@app.command()
def train(
    config: ConfigOption,
    task: TaskOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the adapters: OUT/<task>.")] = Path("results/adapters"),
    overwrite: bool = False,
) -> None:
    """Train one adapter a task. Under `accelerate launch`: recipes/train_adapter.py with the same options."""
    from osrm_peft.files import read_manifest
    from osrm_peft.recipe import Recipe

    recipe = Recipe.from_yaml(config)
    for name in _chosen(task, recipe.task_names()):
        if read_manifest(out / name).get("kind") == "adapter" and not overwrite:
            _say(f"{out / name} is there already (--overwrite makes it anew)")
            continue
        _say(f"wrote {recipe.train(name, out / name, overwrite=overwrite)}")


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(help="Adapters, as TASK=FOLDER or TASK=user/name (or just FOLDER).")],
    out: Annotated[Path, typer.Option(help="Folder of the merged adapter.")],
    method: Annotated[str, typer.Option("--method", "-m", help="average, task_arithmetic, ties or lore.")] = "average",
    weight: Annotated[list[str] | None, typer.Option(help="TASK=NUMBER; repeat it.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of the method.")] = None,
    scale: Annotated[float | None, typer.Option(help="λ. Default: the method's paper's.")] = None,
    space: Annotated[str, typer.Option(help="auto, weight or core.")] = "auto",
    rank: Annotated[int | None, typer.Option(help="Largest rank of the result. Default: exact.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model, where the adapters name it differently.")
    ] = None,
) -> None:
    """Merge LoRA adapters into one, with each task's head beside it. The base model is not read."""
    from osrm_peft.files import check_replaceable
    from osrm_peft.merging import merge_adapters

    named = [(Path(text).name, text) if Path(text).is_dir() or "=" not in text else _pair(text) for text in adapters]
    if len(dict(named)) < len(named):
        raise ValueError(f"two adapters have the same name among {[name for name, _ in named]}: write TASK=FOLDER")
    weights, options = _values(weight), _values(option)
    check_replaceable(out, "merged")
    merged = merge_adapters(
        dict(named),
        method,
        weights=weights or None,
        scale=scale,
        space=space,
        rank=rank,
        base_model=base_model,
        progress=True,
        **options,
    )
    merged.save_pretrained(out)
    kept = min(merged.energy_kept().values())
    _say(f"wrote {out}: rank {merged.for_task(None).rank}, energy kept per layer at least {kept:.4f}")


@app.command()
def evaluate(
    adapter: Annotated[str, typer.Argument(help="A merged folder, or one adapter's folder or Hub id.")],
    suite: SuiteOption = "packaged",
    task: TaskOption = None,
    model: Annotated[str | None, typer.Option(help="Base model. Default: the one the adapter names.")] = None,
    rows: Annotated[int | None, typer.Option(help="Validation rows a task. Default: all.")] = None,
    max_length: int = 128,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.")] = None,
) -> None:
    """Score an adapter on a suite's tasks: a merged one with each task's head, a single one on its own task."""
    from osrm_peft.adapter_reader import load_adapter
    from osrm_peft.evaluation import evaluate_task
    from osrm_peft.files import read_manifest, versions, write_json
    from osrm_peft.report import MultiTaskTable, Score
    from osrm_peft.tasks import load_task
    from osrm_peft.training import load_tokenizer

    manifest = read_manifest(adapter)
    merged = manifest.get("kind") == "merged" and "inputs" in manifest
    names = task or (list(manifest["inputs"]) if merged else [manifest["task"]] if "task" in manifest else None)
    if names is None:
        raise ValueError(f"{adapter} does not say which task it is for: name it with --task")
    scores = []
    for name in names:
        rows_of_task = load_task(suite, name).sample(validation=rows)
        loaded = load_adapter(adapter, head=name if merged else None)
        base = model or loaded.base_model or ""
        value = evaluate_task(loaded.attach(base), rows_of_task, load_tokenizer(base), max_length=max_length)
        method, scale = (manifest["method"], manifest["scale"]) if merged else ("individual", None)
        scores.append(Score(Path(adapter).name, method, scale, 0, name, value))
    console.print(MultiTaskTable.of(scores).terminal(f"Scores in percent on {suite}"))
    if out is not None:
        settings = {
            "adapter": adapter,
            "suite": suite,
            "model": model,
            "rows": rows,
            "max_length": max_length,
        }
        found = {score.task: score.score for score in scores}
        write_json(out, {"scores": found, "settings": settings, "manifest": manifest, "versions": versions()})


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Sets of adapters; more than one shows the spread.")] = 1,
    osrm: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of OSRMLoraConfig, for the OSRM adapters.")] = None,
) -> None:
    """Everything once, on a real small model and six real tasks that need no network."""
    import warnings

    import transformers

    from osrm_peft.demo import OSRM, run_demo

    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own, about its own names
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run_demo(out, seeds=range(42, 42 + seeds), osrm=OSRM | _values(osrm), console=console)
    except KeyboardInterrupt:
        _say(f"interrupted; what is finished lies in {out}: run the same command to go on")
        raise typer.Exit(130) from None


def _chosen(tasks: list[str] | None, known: list[str]) -> list[str]:
    unknown = sorted(set(tasks or []) - set(known))
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}: the recipe has {', '.join(known)}")
    return tasks or known


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise ValueError(f"{text!r}: expected NAME=VALUE")
    return name, value


def _values(texts: list[str] | None) -> dict[str, Any]:
    """{NAME: value} of NAME=VALUE texts."""
    from osrm_peft.recipe import parse_yaml

    pairs = [_pair(text) for text in texts or []]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{', '.join(texts or [])}: a name is given twice")
    return {name: parse_yaml(value) for name, value in pairs}


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)  # a path may hold brackets


def main() -> None:
    """Run the command; an error of the user's is one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
