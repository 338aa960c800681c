"""The command around results: report."""

from pathlib import Path
from typing import Annotated

import typer

from osrm_peft.cli.app import app, wrote


@app.command()
def report(
    results: Annotated[list[str], typer.Argument(help="Results folders, searched through; or their JSON files.")],
    out: Annotated[Path, typer.Option(help="The page, one file that needs no network.")] = Path("results/report.html"),
) -> None:
    """Which merge to take, and all results: one HTML page of scores, interference, spectra, drift and merges."""
    from osrm_peft.evaluation.page import write_report

    wrote(out, f": {write_report(results, out).summary()}")
