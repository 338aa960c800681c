"""The commands around features: collect them, look into a file, project an adapter that is trained already."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from osrm_peft.cli.app import JsonOption, TaskOption, app, chosen, progress, quiet_libraries, say, show, wrote

if TYPE_CHECKING:  # the command's help need not wait for torch
    from osrm_peft.features.task_features import TaskFeatures
    from osrm_peft.training.recipe import Recipe

features_app = typer.Typer(
    invoke_without_command=True, help="Collect tasks' features, one file a task; or look into one."
)
app.add_typer(features_app, name="features")


@features_app.callback()
def features(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A recipe; flags go before it.")] = None,
    task: TaskOption = None,
    model: Annotated[
        str | None, typer.Option("--base-model", help="Pre-trained model: Hub id, folder, or packaged.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="packaged, glue, or files:FOLDER.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="A target module; repeat it. Default: PEFT's.")] = None,
    statistic: Annotated[str | None, typer.Option(help="mean, sample or token.")] = None,
    num_samples: Annotated[int | None, typer.Option("--num-samples", "-k", help="Samples a task.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row is cut to.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the samples.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the file: float32 or bfloat16.")] = "float32",
    group_size: Annotated[int | None, typer.Option(help="Distinct inputs in memory at once. Default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder: OUT/<task>.features.safetensors.")] = None,
    overwrite: bool = False,
) -> None:
    """Collect the tasks' features on the pre-trained model, one file a task: from a recipe, or from flags alone."""
    if context.invoked_subcommand is not None:
        return
    import torch

    from osrm_peft.checks import choice
    from osrm_peft.distributed import start
    from osrm_peft.features.task_features import TaskFeatures
    from osrm_peft.io.places import check_file

    choice("dtype", dtype, ("float32", "bfloat16"))
    recipe = _recipe(
        config, target, statistic, model=model, suite=suite, num_samples=num_samples, max_length=max_length, seed=seed,
        features=None if out is None else str(out),
    )  # fmt: skip
    quiet_libraries()

    def there(path: Path) -> bool:
        if found := path.exists() and not overwrite:
            _check_same(TaskFeatures.load(path), recipe)
        return found

    names, processes = chosen(task, recipe.task_names()), start()
    for name in names:
        check_file(recipe.features_file(name))
    missing = []
    for name in names:
        path = recipe.features_file(name)
        if processes.broadcast_from_main(partial(there, path)):
            say(f"{path} is there already (--overwrite makes it anew)")
        else:
            missing.append(name)
    _collect(recipe, missing, group_size, getattr(torch, dtype))


def collect_missing(recipe: "Recipe", names: list[str]) -> None:
    """Collect the features that training these tasks needs and that are not there yet; say so first."""
    import torch

    from osrm_peft.distributed import start

    missing = start().broadcast_from_main(partial(recipe.missing_features, names))
    if missing:
        say(f"the features of {', '.join(missing)} are not there yet: collecting them first")
        _collect(recipe, missing, None, torch.float32)


def _collect(recipe: "Recipe", names: list[str], group_size: int | None, dtype: Any) -> None:
    from osrm_peft.distributed import start

    base, processes = recipe.base(distributed=True) if names else None, start()
    for name in names:
        path = recipe.features_file(name)
        found = recipe.collect(name, base=base, group_size=group_size, progress=progress(), distributed=True)
        processes.broadcast_from_main(partial(found.save, path, dtype))
        wrote(path)


def _recipe(config: Path | None, target: list[str] | None, statistic: str | None, **flags: Any) -> "Recipe":
    """The recipe of a file, with the flags that are given over it; or of flags alone."""
    from osrm_peft.training.recipe import Recipe

    given = {name: value for name, value in flags.items() if value is not None}
    if config is None and not {"model", "suite"} <= set(given):
        raise ValueError("give a recipe (--config), or --base-model and --suite")
    recipe = Recipe(**given) if config is None else replace(Recipe.from_yaml(config), **given)
    if target:
        recipe = replace(recipe, lora=recipe.lora | {"target_modules": target})
    if statistic is not None:
        recipe = replace(recipe, osrm=(recipe.osrm or {}) | {"statistic": statistic})
    return recipe


def _check_same(found: "TaskFeatures", recipe: "Recipe") -> None:
    """Is a file that is there already what is asked for?"""
    from osrm_peft.hub.privacy import public_name
    from osrm_peft.models.packaged import resolve_model

    asked = {"statistic": (recipe.osrm or {}).get("statistic", found.statistic), "seed": recipe.seed}
    asked |= {"base_model": public_name(resolve_model(recipe.model)), "tokens": recipe.tokens}
    wrong = [name for name, value in asked.items() if getattr(found, name) != value]
    if wrong or found.num_samples > recipe.num_samples:
        name = wrong[0] if wrong else "num_samples"
        value = asked.get(name, recipe.num_samples)
        raise ValueError(
            f"{recipe.features_file(found.task)} is there already, with {name}={getattr(found, name)!r} and not "
            f"{value!r}: --overwrite makes it anew, --out writes beside it"
        )


@features_app.command("show")
def _show(
    file: Annotated[str, typer.Argument(help="A features file, or a Hub repository with one.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a features file is of, what it holds, and what it reveals."""
    from osrm_peft.cli.tables import features_facts, features_tables
    from osrm_peft.features.file import features_file
    from osrm_peft.features.task_features import TaskFeatures

    show(features_facts(TaskFeatures.load(file), features_file(file)), features_tables)


@app.command()
def project(
    adapter: Annotated[str, typer.Argument(help="The trained adapter: folder or Hub id.")],
    features: Annotated[list[str], typer.Option(help="Features of another task; repeat it.")],
    out: Annotated[Path, typer.Option(help="Folder for the projected adapter.")],
    in_task: Annotated[str | None, typer.Option(help="Features of the adapter's own task.")] = None,
    min_effect_kept: Annotated[
        float | None, typer.Option(help="Share of the own effect to keep. Default: the paper's way.")
    ] = None,
    null_space: Annotated[
        Literal["random", "in_task"], typer.Option(help="Who chooses where others are quiet.")
    ] = "random",
    protect_rank: Annotated[int | None, typer.Option(help="How many of the strongest directions to avoid.")] = None,
    protect_energy: Annotated[float | None, typer.Option(help="Share of the energy whose directions to avoid.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another adapter of ours.")] = False,
) -> None:
    """OSRM after the fact: keep a trained adapter away from the other tasks' features (paper §5.4)."""
    from osrm_peft.io.manifest import check_replaceable
    from osrm_peft.osrm.project import project_adapter

    check_replaceable(out, "adapter")
    projection = project_adapter(
        adapter, features, in_task=in_task, min_effect_kept=min_effect_kept, null_space=null_space,
        protect_rank=protect_rank, protect_energy=protect_energy, seed=seed, progress=progress(),
    )  # fmt: skip
    projection.save_pretrained(out, overwrite=overwrite)
    mean = projection.mean()
    parts = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in mean.items()]
    least = min(layer.energy_kept for layer in projection.layers.values())
    wrote(out, f": means over {len(projection.layers)} layers: {', '.join(parts)}; least energy kept {least:.3g}")
