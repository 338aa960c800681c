"""Every table and figure of both papers, one command: a graph of cached artefacts, resumable.

    python recipes/reproduce.py --config recipes/configs/reproduce_minilm.yaml --dry-run      # the graph and its cost
    python recipes/reproduce.py --config recipes/configs/reproduce_minilm.yaml                # everything in it
    python recipes/reproduce.py --config … --experiments main scales                          # some of it
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/reproduce.py --config …     # processes share it
    python recipes/reproduce.py --config … --submit slurm --submit-option timeout_min=240 --submit-option mem_gb=64

Artefacts (features, learning rates, adapters, statistics, scores) lie in --cache under the hash of what they are made
from: what is there is not made again, experiments share them, and an interrupted run goes on. `--submit` makes them as
arrays of SLURM jobs (`--submit local`: as processes here) through submitit, a level of the graph after the other.
"""

import argparse
import os
import shlex
import sys
import warnings
from pathlib import Path

import transformers
from reproduction.experiments import planned
from reproduction.graph import dispatch, missing, plan_table, run
from reproduction.outputs import write_outputs
from reproduction.suite import Suite
from rich.console import Console

from osrm_peft.cli.app import values
from osrm_peft.distributed import start
from osrm_peft.io.places import check_file, check_folder


def main() -> None:
    """Plan, make what is missing, write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--experiments", nargs="+", default=[], help="default: all of the configuration")
    parser.add_argument("--cache", type=Path, default=Path("results/reproduce"), help="of the artefacts")
    parser.add_argument("--out", type=Path, help="default: CACHE/<configuration>")
    parser.add_argument("--dry-run", action="store_true", help="show what would be made")
    parser.add_argument("--submit", choices=["slurm", "local"], help="make artefacts as jobs, through submitit")
    parser.add_argument("--submit-option", action="append", default=[], metavar="NAME=VALUE", help="of submitit")
    arguments = parser.parse_args()
    suite = Suite.from_yaml(arguments.config)
    experiments = planned(suite, arguments.experiments)
    wanted = [node for one in experiments for node in one.needs()]
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    if arguments.dry_run:
        console.print(plan_table(wanted, arguments.cache))
        return
    out = check_folder(arguments.out or arguments.cache / arguments.config.stem)
    for path in (out / "README.md", out / "report.html", *(out / one.name / "table.md" for one in experiments)):
        check_file(path)
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own, about its own names
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    processes = start()
    if arguments.submit:
        dispatch(wanted, arguments.cache, _executor(arguments), console)
    else:
        run(wanted, arguments.cache, processes, console)
    if processes.is_main_process:
        shown = [one for one in planned(suite, []) if not missing(one.needs(), arguments.cache)]
        write_outputs(suite, shown, arguments.cache, out, f"python recipes/reproduce.py {shlex.join(sys.argv[1:])}")
        pages = [str(path) for path in (out / "README.md", out / "report.html") if path.exists()]
        console.print(f"wrote {' and '.join(pages)}: all experiments of the configuration whose artefacts are there")


def _executor(arguments: argparse.Namespace):
    import submitit

    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )  # for jobs
    executor = submitit.AutoExecutor(arguments.cache.resolve() / "jobs", cluster=arguments.submit)
    executor.update_parameters(**values(arguments.submit_option))
    return executor


if __name__ == "__main__":
    main()
