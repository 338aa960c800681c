"""The commands around merging: merge, interference, statistics."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from osrm_peft.cli.app import (
    ConfigOption,
    JsonOption,
    TaskOption,
    app,
    chosen,
    load_torch,
    pairs,
    progress,
    quiet_libraries,
    say,
    show,
    sources,
    values,
    wrote,
)
from osrm_peft.cli.methods import OPTIONS, listed
from osrm_peft.io.yaml import parse_yaml

if TYPE_CHECKING:
    from osrm_peft.merging.plan import MergePlan
    from osrm_peft.merging.request import MergeRequest

AdaptersArgument = Annotated[
    list[str] | None, typer.Argument(help="Adapters, as TASK=FOLDER or TASK=user/name (or just FOLDER).")
]
StatisticsOption = Annotated[list[str] | None, typer.Option(help="TASK=FILE for fisher and regmean; repeat it.")]
SpaceOption = Annotated[
    Literal["auto", "weight", "core", "knots"] | None, typer.Option(help="Where the method runs. Default: auto.")
]
_WRITTEN = ("written_rank", "energy_kept", "serving")  # fields of a manifest
FeaturesOption = Annotated[list[str] | None, typer.Option(help="TASK=FILE of the pre-trained model; repeat it.")]


@app.command(epilog=listed(OPTIONS))
def merge(
    adapters: AdaptersArgument = None,
    out: Annotated[Path, typer.Option(help="Folder of the merged adapter.")] = Path("results/merged"),
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A merge recipe; flags go before it.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="See below. Default: average.")] = None,
    weight: Annotated[list[str] | None, typer.Option(help="TASK=NUMBER; repeat it.")] = None,
    weights: Annotated[str | None, typer.Option(help="features or features_global: chosen by --features.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of the method.")] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="λ, or features. Default: the method's paper's. Repeat it for a sweep: OUT/scale_<λ>."),
    ] = None,
    space: SpaceOption = None,
    rank: Annotated[str | None, typer.Option(help="Largest rank of the result, or serving. Default: exact.")] = None,
    cut: Annotated[str | None, typer.Option(help="What --rank keeps: features (of --features). Default: SVD.")] = None,
    modules: Annotated[
        str | None,
        typer.Option(help="Modules trained whole (lm_head, …): average (default), per_task, error, or a task."),
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model, where adapters name it differently.")] = None,
    statistics: StatisticsOption = None,
    features: FeaturesOption = None,
    seed: Annotated[int | None, typer.Option(help="Of methods that draw (dare).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cpu.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another result of ours.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be merged.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge LoRA adapters into one, with each task's head beside it. The base model is not read."""
    load_torch()
    from osrm_peft.merging.plan import plan_merge
    from osrm_peft.merging.request import MergeRequest

    if weight and weights:
        raise ValueError("give --weight TASK=NUMBER or --weights features, not both")
    scales = [parse_yaml(text) for text in scale or []]
    given: dict[str, Any] = {
        "adapters": sources(adapters),
        "method": method,
        "options": values(option),
        "weights": values(weight) or weights,
        "scale": scales[0] if len(scales) == 1 else scales or None,
        "space": space,
        "rank": None if rank is None else parse_yaml(rank),
        "cut": cut,
        "modules": modules,
        "base_model": base_model,
        "statistics": pairs(statistics) or None,
        "features": pairs(features) or None,
        "seed": seed,
        "device": device,
    }
    given = {name: value for name, value in given.items() if value not in (None, {})}
    request = MergeRequest.from_fields(**given) if config is None else MergeRequest.from_yaml(config, **given)
    folders, plan = _folders(request, out), plan_merge(request.at_first_scale())
    _check_folders(plan, folders, out, overwrite)
    if dry_run:
        return _show(plan, folders)
    _write(plan, folders, overwrite)


def _folders(request: "MergeRequest", out: Path) -> list[tuple[Any, Path]]:
    """(scale, its folder): OUT, or in a sweep OUT/scale_<λ>; checked."""
    from osrm_peft.io.manifest import check_replaceable
    from osrm_peft.merging.methods.registry import get_method

    scales, kind = request.scales(), get_method(request.method).kind
    foreign = [entry.name for entry in out.glob("*") if not entry.name.startswith("scale_")] if len(scales) > 1 else []
    if foreign:
        raise FileExistsError(f"{out} holds {foreign[0]}, so no sweep is written into it: name a new folder")
    folders = [(scale, out / f"scale_{scale!r}" if len(scales) > 1 else out) for scale in scales]
    for _, folder in folders:
        check_replaceable(folder, kind)
    return folders


def _check_folders(plan: "MergePlan", folders: list[tuple[Any, Path]], out: Path, overwrite: bool) -> None:
    """Are the folders free, or of the same merge? A sweep's folder is of one sweep."""
    from osrm_peft.io.manifest import check_replaceable, read_manifest, what_is_lost

    made = plan.manifest()
    for scale, folder in folders:
        check_replaceable(folder, plan.method.kind, made if len(folders) == 1 else made | {"scale": scale}, overwrite)
    places = [folder for _, folder in folders]
    for folder in sorted(set(out.glob("scale_*")) - set(places)) if len(places) > 1 else []:
        earlier = read_manifest(folder)
        if what_is_lost(earlier | {"scores": []}, made | {"scale": earlier.get("scale")}):
            raise FileExistsError(f"{out} holds {folder.name} of another sweep: name a new folder")


def _show(plan: "MergePlan", folders: list[tuple[Any, Path]]) -> None:
    from osrm_peft.cli.tables import plan_facts, plan_tables
    from osrm_peft.merging import advice

    advice.warn([*advice.of_plan(plan), *advice.of_result(plan)])
    places = [{"folder": str(folder), "scale": scale if len(folders) > 1 else plan.scale} for scale, folder in folders]
    lines = [f"would write {one['folder']}" + f" at λ = {one['scale']!r}" * (len(places) > 1) for one in places]
    show(plan_facts(plan) | {"would_write": places}, lambda facts: [*plan_tables(facts), *lines])


def _write(plan: "MergePlan", folders: list[tuple[Any, Path]], overwrite: bool) -> None:
    from osrm_peft.distributed import start
    from osrm_peft.io.manifest import read_manifest
    from osrm_peft.merging.emr_adapter import EMRAdapter
    from osrm_peft.merging.merge import execute

    processes = start()
    merged = execute(plan, processes, progress=progress())
    facts = []
    for scale, folder in folders if processes.is_main_process else ():
        scaled = merged if len(folders) == 1 else merged.at_scale(scale)
        scaled.save_pretrained(folder, overwrite=overwrite)
        if isinstance(scaled, EMRAdapter):
            wrote(folder, f": one shared vector, masks and scales of {len(scaled.tasks)} tasks")
            facts.append({"folder": str(folder), "scale": scaled.scale, "tasks": list(scaled.tasks)})
            continue
        written = read_manifest(folder)
        kept = min(written["energy_kept"].values())
        facts.append({"folder": str(folder)} | {name: written.get(name) for name in ("scale", *_WRITTEN)})
        wrote(folder, f": rank {written['written_rank']}, energy kept per layer at least {kept:.4f}")
        for one_rank, energy in written.get("serving", {}).items():
            say(f"  at rank {one_rank} the worst layer keeps {energy:.4f} of its energy")
    show({"written": facts}, lambda _: [])


@app.command()
def interference(
    adapters: Annotated[list[str], typer.Argument(help="Adapters, as TASK=FOLDER or just FOLDER.")],
    features: FeaturesOption = None,
    base: Annotated[
        str | None,
        typer.Option("--base-model", help="Pre-trained model to compare with. Default: each task's own adapter."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for interference.json and .png.")] = Path("results/interference"),
    as_json: JsonOption = False,
) -> None:
    """Before merging: which adapters share A or B; with features, how strongly each acts on the other tasks'."""
    load_torch()
    from osrm_peft.evaluation.interference import interference as measure
    from osrm_peft.evaluation.plots import plot_interference
    from osrm_peft.evaluation.tables import interference_table, overlap_table
    from osrm_peft.io.json import write_json
    from osrm_peft.io.manifest import versions
    from osrm_peft.io.places import check_file

    for name in ("interference.json", "interference.png"):
        check_file(out / name)
    named, files = sources(adapters), pairs(features) or None
    if base is not None and files is None:
        raise ValueError("--base-model is compared with on features: give --features TASK=FILE of every task, too")
    model = None
    if base is not None:
        from osrm_peft.models.loading import load_base

        quiet_libraries()
        model = load_base(base, 2)
    found = measure(named, files, base=model, progress=progress())
    settings = {"adapters": named, "features": files, "base": base}
    content = found.to_dict() | {"settings": settings, "versions": versions()}
    write_json(out / "interference.json", content)
    plot_interference({"adapters": found}, out / "interference.png")
    overlaps = [overlap_table(found), found.verdict()] if len(named) > 1 else []
    show(content, lambda _: [*([interference_table(found)] if found.layers else []), *overlaps])
    wrote(f"{out}/interference.json and {out}/interference.png")


@app.command()
def statistics(
    config: ConfigOption,
    kind: Annotated[Literal["gram", "fisher"], typer.Option(help="gram is for regmean.")],
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of the adapters: ADAPTERS/<task>. Default: adapters, in the recipe's out."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder: OUT/<task>.<kind>.safetensors. Default: statistics, in the recipe's out."),
    ] = None,
    task: TaskOption = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows a task.")] = 1000,
    overwrite: bool = False,
) -> None:
    """Collect what RegMean and Fisher merging need, on the fine-tuned models: one file a task."""
    from osrm_peft.checks import choice
    from osrm_peft.distributed import start
    from osrm_peft.io.places import check_file
    from osrm_peft.training.recipe import STATISTIC_KINDS, Recipe

    choice("kind", kind, STATISTIC_KINDS)
    quiet_libraries()
    recipe, processes = Recipe.from_yaml(config), start()
    adapters = Path(recipe.out, "adapters") if adapters is None else adapters
    out = Path(recipe.out, "statistics") if out is None else out
    paths = {name: out / f"{name}.{kind}.safetensors" for name in chosen(task, recipe.task_names())}
    for path in paths.values():
        check_file(path)
    for name, path in paths.items():
        if processes.broadcast_from_main(path.exists) and not overwrite:
            say(f"{path} is there already (--overwrite makes it anew)")
            continue
        found = recipe.collect_statistics(
            kind, name, adapters / name, num_samples=rows, progress=progress(), distributed=True
        )
        processes.broadcast_from_main(partial(found.save, path))
        wrote(path)
