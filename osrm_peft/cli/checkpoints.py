"""The commands around full models: merge-checkpoints, inspect."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from osrm_peft.cli.app import app, console, say, sources, values


@app.command("merge-checkpoints")
def merge_checkpoints(
    models: Annotated[list[str], typer.Argument(help="Models, as NAME=FOLDER or NAME=user/name (or just FOLDER).")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="average, task_arithmetic, ties, dare, dare_ties, lore, tsv, iso, emr")
    ] = "average",
    base: Annotated[
        str | None, typer.Option(help="The model they were trained from. average, lore: none needed.")
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
    shard_size: Annotated[int, typer.Option(help="Bytes of a weight file, at most.")] = 5 * 10**9,
    seed: Annotated[int, typer.Option(help="Of methods that draw (dare).")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this merge where it was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another result of ours.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be written.")] = False,
) -> None:
    """Merge full models into one, from disk to disk; none is ever in memory as a whole."""
    from osrm_peft.checkpoints.merge import execute
    from osrm_peft.checkpoints.plan import plan_checkpoints
    from osrm_peft.io.manifest import check_replaceable
    from osrm_peft.io.places import check_space

    folder = check_replaceable(out, "checkpoint")
    plan = plan_checkpoints(
        sources(models), method, base=base, weights=values(weight) or None, scale=scale, heads=heads or [],
        vocab=vocab, tokenizer=tokenizer, dtype=dtype, shard_size=shard_size, seed=seed, **values(option),
    )  # fmt: skip
    check_replaceable(folder, "checkpoint", plan.manifest(), overwrite)
    size = plan.size_of(list(plan.shapes)) / 2**30
    if plan.text.line():
        say(plan.text.line())
    if dry_run:
        check_space(folder, plan.size_of(list(plan.shapes)))
        say(f"would write {out}: {len(plan.shapes)} tensors, {size:.2f} GiB in {len(plan.shards)} files")
        return
    execute(plan, folder, resume=resume, overwrite=overwrite, progress=True)
    say(f"wrote {out}: {len(plan.shapes)} tensors, {size:.2f} GiB in {len(plan.shards)} files")


@app.command()
def inspect(
    models: Annotated[list[str], typer.Argument(help="Adapters, as TASK=FOLDER or just FOLDER; or full models.")],
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Singular values of the task vectors, also of full models.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Full models' base. Default: their mean, as LoRE begins.")] = None,
    layer: Annotated[str, typer.Option(help="Which matrices: a pattern of their names.")] = "*",
    out: Annotated[Path, typer.Option(help="Folder for spectrum.json and .png.")] = Path("results/spectrum"),
) -> None:
    """Show what adapters hold: layers, ranks, scales, norms, heads, base; or how task vectors' singular values fall."""
    named = sources(models)
    if not spectrum:
        from osrm_peft.adapters.load import load_adapter
        from osrm_peft.cli.tables import adapter_tables

        for table in adapter_tables({name: load_adapter(source) for name, source in named.items()}):
            console.print(table)
        return
    from osrm_peft.evaluation.spectra import plot_spectra, spectra, spectra_table
    from osrm_peft.io.json import write_json
    from osrm_peft.io.manifest import versions
    from osrm_peft.io.places import check_file

    for name in ("spectrum.json", "spectrum.png"):
        check_file(out / name)
    found = spectra(named, base=base, layer=layer, progress=True)
    settings = {"models": named, "base": base, "layer": layer}
    write_json(out / "spectrum.json", {"singular_values": found, "settings": settings, "versions": versions()})
    plot_spectra(found, out / "spectrum.png")
    console.print(spectra_table(found))
    say(f"wrote {out}/spectrum.json and {out}/spectrum.png")
