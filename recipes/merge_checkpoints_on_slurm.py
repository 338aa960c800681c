"""A merge of full checkpoints, its weight files shared among machines with a common disk: an array of SLURM jobs.

    python recipes/merge_checkpoints_on_slurm.py --parts 8 --submit-option timeout_min=240 -- \\
        org/math org/code --base-model org/base --method ties --shard-size 5GB --out merged

What stands behind `--` are the words of `osrm-peft merge-checkpoints`. `--submit local` runs the jobs as processes
here. Jobs that were interrupted go on when the same command is given again.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from osrm_peft.cli.app import values

COMMAND = (sys.executable, "-m", "osrm_peft", "merge-checkpoints")


def main() -> None:
    """Check the merge, write its parts as jobs, and finish it as one more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--submit", choices=["slurm", "local"], default="slurm")
    parser.add_argument("--submit-option", action="append", default=[], metavar="NAME=VALUE", help="of submitit")
    parser.add_argument("--jobs", type=Path, default=Path("jobs"), help="folder of the jobs' logs")
    parser.add_argument("words", nargs="+", help="behind --: models and options of osrm-peft merge-checkpoints")
    arguments = parser.parse_args()
    run([*arguments.words, "--part", f"{arguments.parts}/{arguments.parts}", "--dry-run"])
    import submitit

    executor = submitit.AutoExecutor(arguments.jobs, cluster=arguments.submit)
    executor.update_parameters(**values(arguments.submit_option))
    parts = [[*arguments.words, "--part", f"{number}/{arguments.parts}"] for number in range(1, arguments.parts + 1)]
    for job in executor.map_array(run, parts):
        job.result()
    executor.submit(run, [*arguments.words, "--resume"]).result()


def run(words: Sequence[str]) -> None:
    """One `osrm-peft merge-checkpoints`; what it prints is in the job's log."""
    done = subprocess.run([*COMMAND, *words], check=False)
    if done.returncode:
        raise SystemExit(f"osrm-peft merge-checkpoints {' '.join(words)} ended with {done.returncode}")


if __name__ == "__main__":
    main()
