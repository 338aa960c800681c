"""Train the adapter of one task (or of several, one after the other) of a recipe.

    accelerate launch recipes/train_adapter.py --config recipes/configs/minilm_packaged.yaml --task tweets

An OSRM recipe needs the features of its tasks first, once:

    osrm-peft features --config recipes/configs/minilm_packaged_osrm.yaml
"""

import argparse
import os
from pathlib import Path

from osrm_peft.io.places import check_folder
from osrm_peft.training.recipe import Recipe


def main(description: str | None = __doc__) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML of recipes/configs/")
    parser.add_argument("--task", action="append", help="a task; repeat it (default: all of the recipe)")
    parser.add_argument("--out", type=Path, help="OUT/<task> (default: adapters, in the recipe's out)")
    arguments = parser.parse_args()

    recipe = Recipe.from_yaml(arguments.config)
    tasks, out = arguments.task or recipe.task_names(), arguments.out or Path(recipe.out, "adapters")
    for task in tasks:
        check_folder(out / task)
    for task in tasks:
        folder = recipe.train(task, out / task)
        if os.environ.get("RANK", "0") == "0":
            print(f"wrote {folder}")


if __name__ == "__main__":
    main()
