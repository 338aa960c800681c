"""What choosing a merge costs: successive halving against all candidates on all rows, on the demo's adapters.

osrm-peft demo
python benchmarks/choosing.py --demo results/demo/seed42 --init plain_LoRA
"""

import argparse
import time
from pathlib import Path

from osrm_peft import load_task, select_merge


def main() -> None:
    """Select twice, and print rows, seconds and winner of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("results/demo/seed42"), help="a seed's folder of the demo")
    parser.add_argument("--init", default="plain_LoRA", help="which of its adapters")
    parser.add_argument("--rows", type=int, default=256, help="rows a task to choose on, and for the test")
    arguments = parser.parse_args()
    root, init = arguments.demo, arguments.init
    adapters = {folder.name: folder for folder in sorted((root / "adapters" / init).iterdir())}
    files = {
        "features": {name: root / f"features/{name}.features.safetensors" for name in adapters},
        "gram": {name: root / f"statistics/{init}/{name}.gram.safetensors" for name in adapters},
    }
    tasks = {name: load_task("packaged", name) for name in adapters}
    found = {}
    for halving in (True, False):
        start = time.perf_counter()
        found[halving] = select_merge(
            adapters, tasks=tasks, rows=arguments.rows, max_length=48, halving=halving, progress=True, **files
        )
        selection, seconds = found[halving], time.perf_counter() - start
        top, test = selection.ranked[0], sum(line.rows for line in selection.test)
        rows = selection.made["rows_scored"]
        name = "halving" if halving else "all rows"
        print(f"{name}: {rows - test} rows to choose, {test} for the test, {seconds:.0f} s")
        print(f"  {selection.verdict()}")
    sweep = [line for line in found[False].ranked if line.candidate["method"] == top.candidate["method"]]
    own = sum(line.rows for line in sweep)
    chosen = found[True].made["rows_scored"] - sum(line.rows for line in found[True].test)
    print(f"halving chooses by {chosen / own:.2f} times the rows of the winner's own {len(sweep)} candidates")


if __name__ == "__main__":
    main()
