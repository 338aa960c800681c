"""The commands around full models: merge-checkpoints, bake, extract, inspect."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from osrm_peft.cli.app import JsonOption, app, load_torch, progress, quiet_libraries, say, show, sources, values, wrote
from osrm_peft.cli.methods import FULL_MODELS, listed

if TYPE_CHECKING:
    from osrm_peft.checkpoints.forecast import Forecast
    from osrm_peft.checkpoints.plan import CheckpointPlan


@app.command("merge-checkpoints", epilog=listed(FULL_MODELS))
def merge_checkpoints(
    models: Annotated[list[str], typer.Argument(help="Models, as NAME=FOLDER or NAME=user/name (or just FOLDER).")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    method: Annotated[str, typer.Option("--method", "-m", help="One of those listed below.")] = "average",
    base: Annotated[
        str | None, typer.Option("--base-model", help="The model they were trained from. average, lore: none needed.")
    ] = None,
    weight: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER; repeat it.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of the method.")] = None,
    scale: Annotated[float | None, typer.Option(help="λ. Default: the method's paper's.")] = None,
    heads: Annotated[
        list[str] | None, typer.Option(help="Tensors that each model keeps: a pattern; repeat it.")
    ] = None,
    vocab: Annotated[
        Literal["error", "intersect"], typer.Option(help="intersect: keep the tokens that all models have.")
    ] = "error",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Whose tokenizer and generation settings: base, or a model. Default: the models'."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        typer.Option(help="Of the result. Default: the models'."),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Of a weight file, at most: 500MB, 2GiB, or bytes.")] = "5GB",
    seed: Annotated[int, typer.Option(help="Of methods that draw (dare).")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cpu.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this merge where it was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another result of ours.")] = False,
    part: Annotated[
        str | None, typer.Option(help="I/N: each N-th weight file from the I-th; --resume finishes.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge full models into one, from disk to disk; none is ever in memory as a whole."""
    load_torch()
    from osrm_peft.checkpoints.merge import execute
    from osrm_peft.checkpoints.plan import plan_checkpoints
    from osrm_peft.cli.tables import checkpoint_facts, checkpoint_lines
    from osrm_peft.io.manifest import check_replaceable

    folder = check_replaceable(out, "checkpoint")
    plan = plan_checkpoints(
        sources(models), method, base=base, weights=values(weight) or None, scale=scale, heads=heads or [], vocab=vocab,
        tokenizer=tokenizer, dtype=dtype, shard_size=shard_size, seed=seed, device=device, **values(option),
    )  # fmt: skip
    check_replaceable(folder, "checkpoint", plan.manifest(), overwrite)
    place = None if part is None else _part(part, plan, resume)
    facts = checkpoint_facts(plan, out, _forecast(plan, dry_run, going_on=resume or place is not None))
    how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "progress": progress()}
    if place is None or dry_run:
        _written(folder, facts, checkpoint_lines(facts), None if dry_run else lambda: execute(plan, folder, **how))
        return
    execute(plan, folder, place, **how)
    say(f"wrote part {part}: when all are there, the same command with --resume in place of --part finishes")
    show(facts, lambda _: [])


def _forecast(plan: "CheckpointPlan", dry_run: bool, going_on: bool) -> "Forecast | None":
    """What a dry run says, and a long merge before it begins; there, no forecast stops a merge that may succeed."""
    from osrm_peft.checkpoints.forecast import forecast

    if dry_run:
        return forecast(plan)
    if plan.method.spectral and not going_on:
        with suppress(ValueError):
            return forecast(plan)
    return None


def _part(text: str, plan: "CheckpointPlan", resume: bool) -> tuple[int, int]:
    """(2, 8) of "2/8", if the plan has these parts."""
    from osrm_peft.checkpoints.merge import check_part

    first, separator, number = text.partition("/")
    if not separator or not first.isdecimal() or not number.isdecimal():
        raise ValueError(f"--part {text}: give I/N, such as 2/8")
    place = int(first), int(number)
    check_part(plan, place, resume)
    return place


@app.command()
def bake(
    base: Annotated[str, typer.Argument(help="The base model: a folder or user/name.")],
    adapter: Annotated[str, typer.Argument(help="The adapter, or a merge of adapters: a folder or user/name.")],
    out: Annotated[Path, typer.Option(help="Folder of the full model.")],
    scale: Annotated[float, typer.Option(help="λ, what multiplies the adapter.")] = 1.0,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Of a merge: whose head the model has.")] = None,
    tokenizer: Annotated[
        Literal["base", "adapter"] | None, typer.Option(help="Whose tokenizer. Default: the adapter's, if it has any.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        typer.Option(help="Of the result. Default: the base's."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another result of ours.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter into its base model's weights, from disk to disk; no model is ever in memory as a whole."""
    from osrm_peft.checkpoints.bake import execute
    from osrm_peft.checkpoints.baking import plan_bake
    from osrm_peft.cli.tables import bake_facts, bake_lines
    from osrm_peft.io.manifest import check_replaceable

    folder = check_replaceable(out, "checkpoint")
    quiet_libraries()
    plan = plan_bake(base, adapter, scale=scale, task=task, tokenizer=tokenizer, dtype=dtype)
    check_replaceable(folder, "checkpoint", plan.manifest(), overwrite)
    facts = bake_facts(plan, out)
    how = {"resume": resume, "overwrite": overwrite, "progress": progress()}
    _written(folder, facts, bake_lines(facts), None if dry_run else lambda: execute(plan, folder, **how))


def _written(folder: Path, facts: dict[str, Any], lines: list[str], execute: Callable[[], Any] | None) -> None:
    """Say what a full model will be, and write it; None: a dry run, which says what would be written.

    Args:
        folder: of the model, links resolved.
        lines: for people; the last is its size.
    """
    from osrm_peft.io.places import check_space

    (*before, size), out = lines, facts["folder"]
    if execute is None:
        check_space(folder, facts["bytes"])
        show(facts, lambda _: [*before, f"would write {out}: {size}"])
        return
    for line in before:
        say(line)
    try:
        execute()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished weight files are kept, --resume goes on with them") from None
    wrote(out, f": {size}")
    show(facts, lambda _: [])


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The model before fine-tuning: a folder or user/name.")],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model: a folder or user/name.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    rank: Annotated[str, typer.Option(help="Largest rank of the adapter, or serving.")] = "16",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="embeddings, norms, heads, others, or none: what is kept whole where it changed; repeat it. "
            "Default: all four."
        ),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the factors.")] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another result of ours.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the difference between a fine-tuned model and its base as a LoRA adapter that stock PEFT loads."""
    from osrm_peft.checkpoints.extract import execute
    from osrm_peft.checkpoints.extracting import KINDS, plan_extract
    from osrm_peft.cli.tables import extract_facts, extract_lines, extraction_facts, extraction_tables
    from osrm_peft.io.manifest import check_replaceable
    from osrm_peft.io.yaml import parse_yaml

    folder = check_replaceable(out, "adapter")
    quiet_libraries()
    kinds = list(KINDS) if keep is None else [] if keep == ["none"] else keep
    plan = plan_extract(base, tuned, rank=parse_yaml(rank), keep=kinds, dtype=dtype)
    check_replaceable(folder, "adapter", plan.manifest(), overwrite)
    facts = extract_facts(plan, out)
    if dry_run:
        show(facts, lambda _: [*extract_lines(facts), f"would write {out}"])
        return
    for line in extract_lines(facts):
        say(line)
    try:
        found = execute(plan, folder, resume=resume, overwrite=overwrite, progress=progress())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished layers are kept, --resume goes on with them") from None
    facts |= extraction_facts(found)
    wrote(out, f": rank {found.rank}, {100 * found.energy:.4g} % of all that changed (‖Δ‖²)")
    show(facts, extraction_tables if progress() else lambda _: [])


@app.command()
def inspect(
    models: Annotated[list[str], typer.Argument(help="Adapters, as TASK=FOLDER or just FOLDER; or full models.")],
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Singular values of the task vectors, also of full models.")
    ] = False,
    base: Annotated[
        str | None, typer.Option("--base-model", help="Full models' base. Default: their mean, as LoRE begins.")
    ] = None,
    layer: Annotated[str, typer.Option(help="Which matrices: a pattern of their names.")] = "*",
    serve: Annotated[
        bool, typer.Option("--serve", help="Which servers take the adapters, alone and swapped for each other.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for spectrum.json and .png.")] = Path("results/spectrum"),
    as_json: JsonOption = False,
) -> None:
    """Show what adapters hold: layers, ranks, scales, norms, heads, base; or how task vectors' singular values fall."""
    load_torch()
    named = sources(models)
    if serve and spectrum:
        raise ValueError("--serve and --spectrum are two questions: ask one")
    if serve:
        from osrm_peft.cli.tables import served_facts, served_tables
        from osrm_peft.merging.serving import served

        show(
            served_facts({name: served(one, [o for o in named.values() if o != one]) for name, one in named.items()}),
            served_tables,
        )
        return
    if not spectrum:
        from osrm_peft.adapters.load import load_adapter
        from osrm_peft.cli.tables import adapter_facts, adapter_tables

        show(adapter_facts({name: load_adapter(source) for name, source in named.items()}), adapter_tables)
        return
    from osrm_peft.evaluation.spectra import plot_spectra, spectra, spectra_table
    from osrm_peft.io.json import write_json
    from osrm_peft.io.manifest import versions
    from osrm_peft.io.places import check_file

    for name in ("spectrum.json", "spectrum.png"):
        check_file(out / name)
    found = spectra(named, base=base, layer=layer, progress=progress())
    settings = {"models": named, "base": base, "layer": layer}
    content = {"singular_values": found, "settings": settings, "versions": versions()}
    write_json(out / "spectrum.json", content)
    plot_spectra(found, out / "spectrum.png")
    show(content, lambda _: [spectra_table(found)])
    wrote(f"{out}/spectrum.json and {out}/spectrum.png")
