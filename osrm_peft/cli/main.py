"""The command `osrm-peft`: a thin skin over the library's functions."""

import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from osrm_peft.checks import is_fault
from osrm_peft.cli import checkpoints, evaluate, features, merge, methods, report, run, select  # noqa: F401 (commands)
from osrm_peft.cli.app import (
    ConfigOption,
    JsonOption,
    TaskOption,
    app,
    as_typed,
    chosen,
    console,
    escape_messages,
    one_line,
    progress,
    quiet_libraries,
    say,
    show,
    values,
    wrote,
)
from osrm_peft.cli.features import collect_missing

if TYPE_CHECKING:
    pass


@app.command()
def train(
    config: ConfigOption,
    task: TaskOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the adapters: OUT/<task>. Default: adapters, in the recipe's out.")
    ] = None,
    overwrite: bool = False,
) -> None:
    """Train one adapter a task; features that are missing are collected first.

    Several processes: `accelerate launch … -m osrm_peft train`, the same options.
    """
    from osrm_peft.io.manifest import read_manifest
    from osrm_peft.io.places import check_folder
    from osrm_peft.pipeline.steps import difference
    from osrm_peft.training.recipe import Recipe

    recipe = Recipe.from_yaml(config)
    names, out = chosen(task, recipe.task_names()), Path(recipe.out, "adapters") if out is None else out
    for name in names:
        check_folder(out / name)
    quiet_libraries()
    collect_missing(recipe, names)
    for name in names:
        manifest = read_manifest(out / name)
        if manifest.get("kind") == "adapter" and not overwrite:
            before, now = manifest.get("made_from"), recipe.made_from(name)
            if before is not None and before != now:
                raise ValueError(
                    f"{out / name} is there already, made from something else ({difference(before, now)}): --overwrite "
                    "makes it anew, --out writes beside it"
                )
            say(f"{out / name} is there already (--overwrite makes it anew)")
            continue
        wrote(recipe.train(name, out / name, overwrite=overwrite, progress=progress()))


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
    osrm: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of OSRMLoraConfig, for one more kind of adapters; repeat it.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe with inits, in the place of the demo's own: the same tables of it.")
    ] = None,
) -> None:
    """Everything once, on a real small model and six real tasks that need no network."""
    import warnings

    from osrm_peft.demo.run import run_demo
    from osrm_peft.training.recipe import Recipe

    quiet_libraries()
    warnings.filterwarnings("ignore", module=r"osrm_peft\.merging")  # it merges with every method on purpose
    try:
        run_demo(
            out,
            seeds=range(42, 42 + seeds),
            recipe=None if recipe is None else Recipe.from_yaml(recipe),
            osrm=values(osrm) or None,
            console=console,
            progress=progress(),
        )
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
