"""A task from the user's own file or Hub dataset: its columns, labels and splits."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

from datasets import Dataset

from osrm_peft.checks import choice, kind, shown, task_names
from osrm_peft.tasks.columns import (
    REGRESSION,
    Example,
    classes_of,
    examples,
    find_columns,
    is_regression,
    is_whole,
    label_key,
)
from osrm_peft.tasks.rows import FORMATS, Rows, is_hub, read_file, read_hub
from osrm_peft.tasks.task import METRICS, ROW_METRICS, Task

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_VALIDATION = ("validation", "valid", "val", "dev", "test")  # of a Hub dataset, the first that is there
_SHARE = 10  # 1 text in 10 is of validation, and 1 of test


class Labelled(Protocol):
    """A row as the splits see it: what makes two rows equal, and the label."""

    @property
    def text(self) -> str: ...  # noqa: D102

    @property
    def label(self) -> str: ...  # noqa: D102


Row = TypeVar("Row", bound=Labelled)


@dataclass(frozen=True)
class TaskData:
    """Where a task's rows are, and what its columns mean.

    Attributes:
        train: a file (CSV, TSV, JSON lines, Parquet), or a Hub dataset `user/name` or `user/name:config`.
        validation: a file; of a Hub dataset the name of a split (None: its validation, else its test). None: 1 text in
            10 of `train`.
        test: a file or the name of a split. None: 1 text in 10 of `train` where validation is taken from it, too; else
            no test rows.
        text: the column of the text, or the two of a pair; None: guessed.
        label: the column of the label; None: guessed.
        labels: the classes in order, as values of that column; None: the sorted values of `train`.
        metric: `"accuracy"`, `"matthews"` or `"pearson_spearman"` (which makes a regression of whole numbers). None:
            accuracy for classes, pearson_spearman for fractional numbers. Of rows of prompt and completion also
            `"exact_match"` (their default), `"rouge_l"` or `"inverse_perplexity"`.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    text: str | list[str] | None = None
    label: str | None = None
    labels: list | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        for name in SPLITS:
            value = getattr(self, name)
            object.__setattr__(self, name, str(value) if isinstance(value, Path) else value)
        kinds: dict[str, Any] = {"train": str, "text": str | list | tuple | None, "labels": list | tuple | None}
        for name, value in asdict(self).items():
            kind(name, value, kinds.get(name, str | None))
        if len(self.texts or ["text"]) not in (1, 2) or not all(isinstance(one, str) for one in self.texts or ()):
            raise ValueError(f"text={shown(self.text)} must be the name of a column, or of two")
        if self.metric is not None:
            choice("metric", self.metric, (*METRICS, *ROW_METRICS))
        keys = self.classes
        if keys is not None and (len(set(keys)) < max(2, len(keys)) or self.metric == REGRESSION):
            raise ValueError(f"labels={shown(self.labels)} must be two or more different classes (and no regression)")

    @property
    def texts(self) -> list[str] | None:
        """The columns of the texts."""
        return [self.text] if isinstance(self.text, str) else None if self.text is None else list(self.text)

    @property
    def classes(self) -> list[str] | None:
        """The classes as text."""
        return None if self.labels is None else [label_key(one, "labels") or "" for one in self.labels]

    def load(self, name: str, tables: Mapping[str, Rows] | None = None) -> Task:
        """Read the task.

        Args:
            tables: its rows, if `read_tables` has read them already.

        Raises:
            ValueError: a fault in a file, a column or a row, with file, line and the way out.
        """
        return _Loaded.of(self, tables).task(name)


@dataclass(frozen=True)
class Facts:
    """What `guess` found in a task's data.

    Attributes:
        data: the same data with text, label and metric filled in.
        columns: names of all columns of the training rows.
        kind: `"classes"` or `"regression"`.
        rows: {split: number of rows}.
        labels: {label: number of rows} of all splits, in the order of the classes; empty for a regression.
        words: median, 95 % quantile and largest number of words of a training row.
    """

    data: TaskData
    columns: list[str]
    kind: str
    rows: dict[str, int]
    labels: dict[str, int]
    words: tuple[int, int, int]


def guess(data: str | Path | TaskData) -> Facts:
    """What a file or a Hub dataset holds, and what its columns seem to mean.

    Raises:
        ValueError: see `TaskData.load`.
    """
    loaded = _Loaded.of(data if isinstance(data, TaskData) else TaskData(str(data)))
    counts = Counter(one.label for found in loaded.splits.values() for one in found)
    words = sorted(len(one.text.split()) for one in loaded.splits["train"])
    return Facts(
        loaded.data,
        loaded.columns,
        "classes" if loaded.classes else "regression",
        {split: len(found) for split, found in loaded.splits.items()},
        {name: counts[name] for name in loaded.classes or ()},
        (int(median(words)), words[int(0.95 * (len(words) - 1))], words[-1]),
    )


def tasks_in(folder: str | Path) -> dict[str, TaskData]:
    """{task: data} of a folder: each file `<task>.csv`, and each folder `<task>/` with `train.csv` and so on.

    Files are CSV, TSV, JSON lines (`.jsonl`) or Parquet; beside `train` may lie `validation` and `test`.

    Raises:
        ValueError: no task in it, a task or a split twice, a folder without `train`, or one task's own folder.
    """
    folder = Path(folder)
    files = _tables(folder)
    if "train" in files:
        raise ValueError(f"{folder} holds one task, {files['train'].name}: put it into {folder}/<task>/")
    tasks = {name: TaskData(str(path)) for name, path in files.items()}
    for below in sorted(path for path in folder.glob("*/") if not path.name.startswith(".") and path.is_dir()):
        splits: dict[str, Any] = {name: str(path) for name, path in _tables(below).items() if name in SPLITS}
        if splits and "train" not in splits:
            raise ValueError(f"{below} has {' and '.join(splits)} and no train: add train.csv")
        if splits and below.name in tasks:
            raise ValueError(f"the task {below.name!r} is there twice: {files[below.name]} and {below}")
        if splits:
            tasks[below.name] = TaskData(**splits)
    if not tasks:
        raise ValueError(
            f"no task in {folder}: expected {folder}/<task>.csv (or .tsv, .jsonl, .parquet), or "
            f"{folder}/<task>/train.csv with validation.csv and test.csv"
        )
    return {name: tasks[name] for name in task_names(sorted(tasks))}


def _tables(folder: Path) -> dict[str, Path]:
    """{name without its ending: file} of a folder's tables."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("[!.]*")):
        if path.is_file() and path.suffix.lower() in FORMATS and path.suffix.lower() != ".json":
            other = found.setdefault(path.stem, path)
            if other != path:
                raise ValueError(f"{other} and {path.name} are both {path.stem!r}: remove one")
    return found


@dataclass(frozen=True)
class _Loaded:
    """A task's rows in their splits, labels as text; `classes` are in order, None for a regression."""

    data: TaskData
    columns: list[str]
    splits: dict[str, list[Example]]
    classes: list[str] | None
    by_number: bool = False  # the user has not named the classes

    @classmethod
    def of(cls, data: TaskData, tables: Mapping[str, Rows] | None = None) -> "_Loaded":
        tables = read_tables(data) if tables is None else tables
        train = tables["train"]
        if data.metric in ROW_METRICS:
            raise ValueError(
                f"{train.source}: metric {data.metric} is of rows of prompt and completion (or messages): choose from "
                f"{', '.join(METRICS)}"
            )
        texts, label = find_columns(train, data.texts, data.label)
        splits = {split: examples(rows, texts, label) for split, rows in tables.items()}
        named = data.classes or (None if data.metric == REGRESSION else _hub_classes(train, label))
        every = [one for found in splits.values() for one in found]
        regression = is_regression(every, data.metric, named)
        splits = without_overlap(splits, train.source)
        classes = None if regression else classes_of(splits["train"], named, train.source)
        if "validation" not in splits:
            wanted = [split for split in SPLITS[1:] if split not in splits]
            splits |= shares(splits["train"], wanted, train.source, regression)
        for split, found in splits.items() if classes is not None else ():
            _check_labels(found, split, classes or [], named)
        metric = data.metric or (REGRESSION if regression else "accuracy")
        text = texts[0] if len(texts) == 1 else texts
        data = replace(data, text=text, label=label, metric=metric)
        return cls(
            data, train.columns, {split: splits[split] for split in SPLITS if split in splits}, classes, not named
        )

    def task(self, name: str) -> Task:
        """The rows as a Task."""
        index = {label: number for number, label in enumerate(self.classes or ())}
        tables = {}
        for split, found in self.splits.items():
            labels: list[Any] = [index[one.label] if index else float(one.label) for one in found]
            columns = {"sentence1": [one.first for one in found], "sentence2": [one.second for one in found]}
            tables[split] = Dataset.from_dict(columns | {"label": labels})
        names = tuple(index) if index and list(index) != list(map(str, index.values())) else None
        if names and self.by_number and all(map(is_whole, names)):
            mapped = ", ".join(f"{label} → {number}" for label, number in index.items())
            logger.warning("%s: labels are not 0 … K−1, so they are numbered anew: %s", self.data.train, mapped)
        train, validation, test = (tables.get(split) for split in SPLITS)
        data = {key: value for key, value in asdict(self.data).items() if value is not None}
        files = {key: data[key] for key in SPLITS if key in data and Path(data[key]).is_file()}
        data |= {key: str(Path(file).resolve()) for key, file in files.items()}  # whatever folder it is read from
        metric = self.data.metric or "accuracy"
        return Task(name, len(index) or 1, metric, train, validation, test, names, data)


def read_tables(data: TaskData) -> dict[str, Rows]:
    """The tables that are given, by split."""
    if not is_hub(data.train):
        named = {split: getattr(data, split) for split in SPLITS}
        return {split: read_file(path) for split, path in named.items() if path is not None}
    found = read_hub(data.train)
    validation = data.validation or next((split for split in _VALIDATION if split in found), None)
    wanted = {"train": "train", "validation": validation, "test": data.test}
    for split in filter(None, wanted.values()):
        if split not in found:
            raise ValueError(f"{data.train} has no split {split!r}, only {', '.join(found)}")
    if data.test is not None and data.test == validation:
        raise ValueError(f"{data.train}: the split {data.test!r} is validation and test: name another")
    return {split: found[name] for split, name in wanted.items() if name is not None}


def _hub_classes(rows: Rows, label: str) -> list[str] | None:
    names = rows.classes.get(label)
    return None if names is None else [label_key(name, rows.source) or "" for name in names]


def _check_labels(found: Sequence[Example], split: str, classes: Sequence[str], named: Sequence[str] | None) -> None:
    known = set(classes)
    for one in found:
        if one.label not in known:
            whose = "is not among labels" if named else f"is in {split}, but not in train"
            raise ValueError(
                f"{one.place}: the label {shown(one.label)} {whose} ({', '.join(map(repr, classes[:20]))})"
            )


# --- splits -------------------------------------------------------------------------------------------------------


def without_overlap(splits: Mapping[str, list[Row]], source: str) -> dict[str, list[Row]]:
    """The splits without rows whose text is in a later one: train gives way to validation, and both to test.

    Raises:
        ValueError: no row of a split is left.
    """
    kept, taken, lost = {}, set[str](), Counter[str]()
    for split in reversed(SPLITS):
        if split in splits:
            kept[split] = [one for one in splits[split] if one.text not in taken]
            lost[split] = len(splits[split]) - len(kept[split])
            taken |= {one.text for one in kept[split]}
            if not kept[split]:
                raise ValueError(f"{source}: every text of {split} is in another split, too: give it rows of its own")
    if sum(lost.values()):
        said = " and ".join(f"{number} of {split}" for split, number in lost.items() if number)
        logger.warning("%s: rows with the text of a row in another split are left out: %s", source, said)
    return kept


def shares(found: list[Row], wanted: Sequence[str], source: str, regression: bool) -> dict[str, list[Row]]:
    """Train and the `wanted` splits of one table, decided by the SHA-256 of the texts.

    1 text in 10 is of each, and at least 2; no text is in two splits, and train keeps a text of every class (of a
    regression, labels are no classes).

    Raises:
        ValueError: too few texts; says how many are needed.
    """
    labels: dict[str, set[str]] = {}
    for one in found:
        labels.setdefault(one.text, set()).add("" if regression else one.label)
    left = Counter(label for of_text in labels.values() for label in of_text)
    needed, place = 2 * len(wanted) + max(2, len(left)), dict.fromkeys(labels, "train")
    digests = {text: hashlib.sha256(text.encode()).digest() for text in labels}
    order = sorted(labels, key=digests.__getitem__)
    most = max(2, min(len(order) // 5, (len(order) - len(left)) // 2))
    rest = iter(order)
    for number, split in enumerate(wanted):
        size = sum(int.from_bytes(digests[text], "big") * _SHARE >> 256 == number for text in order)
        missing = min(most, max(2, size))
        while missing and (text := next(rest, None)) is not None:
            if all(left[label] > 1 for label in labels[text]):
                place[text], missing = split, missing - 1
                left.subtract(labels[text])
    sizes = Counter(place.values())
    if min(sizes[split] for split in ("train", *wanted)) < 2:
        raise ValueError(
            f"{source} has {len(order)} different texts; to take {' and '.join(wanted)} from it, {needed} are needed: "
            "add rows, or name files with validation: and test:"
        )
    return {split: [one for one in found if place[one.text] == split] for split in ("train", *wanted)}
