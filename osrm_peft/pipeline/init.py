"""A commented recipe from a folder of data: what was found in it, and what is usual for the rest."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from osrm_peft.io.places import check_file, new_file
from osrm_peft.pipeline.schema import recipe_schema
from osrm_peft.tasks.files import SPLITS, Facts, guess, tasks_in

SCHEMA = "recipe.schema.json"
_RARE = 0.25  # a class below this share of the rows makes accuracy a poor metric of two classes


def write_recipe(
    data: str | Path, path: str | Path = "recipe.yaml", *, model: str = "packaged", overwrite: bool = False
) -> dict[str, Facts]:
    """Write a recipe for the tasks in a folder, and beside it the JSON Schema that its first line names.

    Args:
        data: holds `<task>.csv` (or .tsv, .jsonl, .parquet), or `<task>/train.csv` with `validation.csv` and `test.csv`
            beside it.
        path: of the recipe.
        model: the base model: Hub id, folder, or `"packaged"`.
        overwrite: replace an earlier recipe.

    Returns:
        {task: what was found in its data}.

    Raises:
        FileExistsError: there is such a file.
        ValueError: no task in the folder, one only, or a fault in a file (names file and line).
    """
    path = Path(path)
    for file in (path, path.with_name(SCHEMA)):
        check_file(file)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: name another recipe, or replace it with overwrite=True")
    facts = {name: guess(one) for name, one in tasks_in(data).items()}
    if len(facts) < 2:
        raise ValueError(f"{data} holds one task, {next(iter(facts))!r}: a merge needs at least two")
    text = recipe_text(facts, path, model)
    with new_file(path.with_name(SCHEMA)) as partial:
        partial.write_text(json.dumps(recipe_schema(), indent=1) + "\n", encoding="utf-8")
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return facts


def recipe_text(facts: Mapping[str, Facts], path: Path, model: str) -> str:
    """The commented YAML of a recipe for these tasks."""
    below = path.resolve().parent
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# Look it over, then: osrm-peft check {path.name}, and osrm-peft run {path.name}.",
        "# Paths are relative to this file.",
        f"model: {_scalar(model)}  # a Hub id, a folder, or packaged (all-MiniLM-L6-v2, 22.7 M parameters)",
        "tasks:",
    ]
    for name, fact in facts.items():
        lines.append(f"  {_scalar(name)}:  # {described(fact)}")
        for split in SPLITS:
            file = getattr(fact.data, split)
            if file is not None:
                lines.append(f"    {split}: {_scalar(Path(os.path.relpath(Path(file).resolve(), below)).as_posix())}")
        columns = fact.data.text if isinstance(fact.data.text, str) else list(fact.data.text or [])
        lines.append(f"    text: {_scalar(columns)}")
        lines.append(f"    label: {_scalar(fact.data.label)}")
        lines.append(f"    metric: {metric_for(fact)}  # accuracy, matthews (rare classes), pearson_spearman (numbers)")
    longest = max(fact.words[1] for fact in facts.values())
    lines += [
        f"max_length: {length_for(facts)}  # tokens a row is cut to; 95 % of the rows have at most {longest} words",
        "lora:",
        "  r: 8",
        "  lora_alpha: 128  # large, and a small learning rate below: A stays where OSRM puts it",
        *(
            ["  target_modules: [query, value]"]
            if model == "packaged"
            else ["  # target_modules: PEFT's for this model"]
        ),
        "osrm: {}  # A away from the other tasks' features (OSRM); leave the line out for plain LoRA",
        "num_samples: 100  # rows a task for its features",
        "training:  # any field of transformers.TrainingArguments",
        "  learning_rate: 3.0e-4  # lower it for large models",
        "  num_train_epochs: 6  # fewer, if you have thousands of rows",
        "  per_device_train_batch_size: 16",
        "select:  # the merge to ship",
        "  rule: mean  # over tasks; relative (to the adapters alone) and worst are the others",
        "  rows: 512  # validation rows a task to choose on, at most",
        "  # rank: serving  # a rank that vLLM makes room for",
        "seed: 42",
        "out: results",
        "# push: {repo: user/name}  # where run pushes the merge that it has chosen",
    ]
    return "\n".join(lines) + "\n"


def described(fact: Facts) -> str:
    """Rows and labels of a task, on one line."""
    rows = ", ".join(f"{number} {split}" for split, number in fact.rows.items())
    counts = sorted(fact.labels.items(), key=lambda one: -one[1])
    shown = ", ".join(f"{' '.join(str(label).split())[:40]} {count}" for label, count in counts[:6])
    more = f" and {len(counts) - 6} more" if len(counts) > 6 else ""
    return f"{rows} rows; " + (f"labels {shown}{more}" if counts else "a number to predict")


def metric_for(fact: Facts) -> str:
    """The metric that suits a task: matthews for two classes of which one is rare."""
    if fact.data.metric not in (None, "accuracy"):
        return str(fact.data.metric)
    if fact.kind == "regression":
        return "pearson_spearman"
    total = sum(fact.labels.values())
    return "matthews" if len(fact.labels) == 2 and min(fact.labels.values()) < _RARE * total else "accuracy"


def length_for(facts: Mapping[str, Facts]) -> int:
    """Tokens for 95 % of the rows of every task: 1.5 a word, in steps of 8, from 16 to 512."""
    words = max(fact.words[1] for fact in facts.values())
    return min(512, max(16, 8 * math.ceil((1.5 * words + 2) / 8)))


def _scalar(value: Any) -> str:
    """A value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
