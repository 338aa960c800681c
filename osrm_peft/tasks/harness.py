"""Text tasks as files that EleutherAI's harness (lm-eval) reads: a YAML file for each task, its rows beside it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from osrm_peft.checks import task_names
from osrm_peft.io.places import beside, check_folder, put_in_place
from osrm_peft.tasks.text import TextTask, prompt_text

VERSION = 1.0  # of how a task is asked and scored; raised when a score would change
TAG = "osrm_peft"  # by which the harness finds all tasks of a folder
_SPLITS = ("train", "validation")  # few-shot examples are of the first


class _Function(str):
    """The name of a function, which lm-eval's files have behind `!function`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", name))
_ROWS, _ROUGE = (_Function(f"osrm_peft.{name}") for name in ("tasks.harness.rows_of", "evaluation.harness.rouge_l"))
_METRICS: dict[str, list[dict[str, Any]]] = {  # the first is the score
    "accuracy": [{"metric": "acc", "aggregation": "mean"}],
    "matthews": [{"metric": "mcc", "aggregation": "matthews_corrcoef"}, {"metric": "acc", "aggregation": "mean"}],
    "exact_match": [{"metric": "exact_match", "aggregation": "mean", "regexes_to_ignore": [r"^\s+", r"\s+$"]}],
    "rouge_l": [{"metric": _ROUGE, "aggregation": "mean"}],
}


def write_harness_tasks(tasks: Iterable[TextTask], folder: str | Path, tokenizer: Any = None) -> list[Path]:
    """Write text tasks as files of lm-eval: `<task>.yaml`, and rows in `<task>.train.jsonl` and `.validation.jsonl`.

    `lm_eval --include_path FOLDER --tasks osrm_peft` runs all of them, on each model and server that lm-eval knows,
    where osrm_peft is installed, which reads the rows. The folder may be moved.

    Args:
        tasks: rank classification becomes `multiple_choice` (acc, or mcc and acc), writing `generate_until`.
        folder: new or empty.
        tokenizer: its chat template puts rows of messages into words; other rows need none.

    Returns:
        The YAML files, in the order of the tasks.

    Raises:
        FileExistsError: the folder holds files, or is none.
        ValueError: a metric that the harness has not; rows of messages without a tokenizer, or its template lacks a
            special token that lm-eval would add.
    """
    tasks, place = list(tasks), check_folder(folder)
    names = task_names(task.name for task in tasks)
    for task in tasks:
        if task.metric not in _METRICS:
            raise ValueError(
                f"{task.name}: the harness has no {task.metric} of text tasks: choose from {', '.join(_METRICS)} "
                "(task.measured_by(…)), or score it without the harness"
            )
    if place.is_dir() and any(place.iterdir()):
        raise FileExistsError(f"{folder} holds files: name a new folder for the harness' tasks")
    with beside(place) as temporary:
        partial = temporary / place.name
        partial.mkdir()
        for task in tasks:
            _write(task, partial, tokenizer)
        put_in_place(partial, place)
    return [place / f"{name}.yaml" for name in names]


def rows_of(config_source: str, **about: Any) -> dict[str, Dataset]:
    """{split: rows with prompt, completion and label} of a task's YAML file; lm-eval calls this."""
    file, found = Path(config_source), {}
    for split in _SPLITS:
        lines = file.with_name(f"{file.stem}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        found[split] = Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})
    return found


def _write(task: TextTask, folder: Path, tokenizer: Any) -> None:
    file = folder / f"{task.name}.yaml"
    file.write_text(yaml.dump(_about(task), Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")
    for split in _SPLITS:
        rows = getattr(task, split)
        texts = [_text(prompt, tokenizer, task.name) for prompt in rows["prompt"]]
        lines = zip(texts, rows["completion"], rows["label"], strict=True)
        content = [dict(zip(("prompt", "completion", "label"), line, strict=True)) for line in lines]
        file.with_name(f"{task.name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def _about(task: TextTask) -> dict[str, Any]:
    """The content of a task's YAML file."""
    kind: dict[str, Any]
    if task.answers is None:
        kind = {"output_type": "generate_until", "doc_to_target": "completion"}
        kind |= {"generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 256}}
    else:
        kind = {"output_type": "multiple_choice", "doc_to_target": "label", "doc_to_choice": list(task.answers)}
    return {
        "task": task.name,
        "tag": TAG,
        "custom_dataset": _ROWS,
        "fewshot_split": "train",
        "validation_split": "validation",
        "doc_to_text": "prompt",
        "target_delimiter": "",  # a completion brings its space along
        **kind,
        "metric_list": [one | {"higher_is_better": True} for one in _METRICS[task.metric]],
        "metadata": {"version": VERSION},
    }


def _text(prompt: Any, tokenizer: Any, name: str) -> str:
    if isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ValueError(
            f"the rows of {name!r} are messages: give the tokenizer whose chat template puts them in words"
        )
    text = prompt_text(prompt, tokenizer)
    added = tokenizer(text)["input_ids"] != tokenizer(text, add_special_tokens=False)["input_ids"]
    if added and not text.startswith(tokenizer.bos_token or tokenizer.eos_token):
        raise ValueError(
            f"the chat template lacks a special token that the harness puts before the rows of {name!r}: give them as "
            "prompt and completion"
        )
    return text
