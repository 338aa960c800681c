"""A task: labelled texts in one shape (sentence1, sentence2, label), and its metric."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

METRICS = ("accuracy", "matthews", "pearson_spearman")
WRITTEN = ("exact_match", "rouge_l")  # of what a causal language model writes
ROW_METRICS = (*WRITTEN, "inverse_perplexity")  # a value a row, and their mean


@dataclass(frozen=True)
class Task:
    """One task: rows with the columns `sentence1` (str), `sentence2` (str or None), `label` (int or float).

    Attributes:
        name: the task's name in its suite.
        num_labels: number of classes; 1 means regression.
        metric: `"accuracy"`, `"matthews"` or `"pearson_spearman"` (the mean of the two correlations).
        train: rows to learn from (and to collect features from).
        validation: rows to choose by, or to report on; no text is in two splits.
        test: rows kept apart from every choice; None: no such rows.
        label_names: class i's name in the user's data; None for numbers 0 … K−1 and for regression.
        data: where the rows are from (the fields of `TaskData`), for the manifest; None for the suites with a name.
    """

    name: str
    num_labels: int
    metric: str
    train: Dataset
    validation: Dataset
    test: Dataset | None = None
    label_names: tuple[str, ...] | None = None
    data: dict[str, Any] | None = None

    def sample(self, *, train: int | None = None, validation: int | None = None, seed: int = 0) -> "Task":
        """The same task on a seeded sample of at most `train` and `validation` rows (None keeps all).

        Test rows are all kept.
        """
        return replace(
            self,
            train=_sample(self.train, train, seed),
            validation=_sample(self.validation, validation, seed),
        )


def tokenize(rows: Dataset, tokenizer, max_length: int) -> Dataset:
    """Token columns of `tokenizer` plus `labels`; truncated to `max_length`, not padded."""

    def encode(batch: dict[str, list]) -> dict[str, Any]:
        pairs = [second or None for second in batch["sentence2"]]
        if any(pairs):
            encoded = tokenizer(
                batch["sentence1"], [second or "" for second in pairs], truncation=True, max_length=max_length
            )
        else:
            encoded = tokenizer(batch["sentence1"], truncation=True, max_length=max_length)
        return {**encoded, "labels": batch["label"]}

    # In memory and without the on-disk cache: the suites are small, and a cache outlives a changed tokenizer.
    return Dataset.from_dict(encode(rows[:]))


def fingerprint(rows: Dataset) -> str:
    """A hash of texts and labels."""
    texts = ("prompt", "completion") if "prompt" in rows.column_names else ("sentence1", "sentence2")
    content = [rows[column] for column in (*texts, "label")]
    return hashlib.sha256(json.dumps([list(column) for column in content]).encode("utf-8", "replace")).hexdigest()[:16]


def _sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    if count is None or count >= len(rows):
        return rows
    if count < 1:
        raise ValueError(f"a sample needs at least 1 row, got {count}")
    return rows.shuffle(seed=seed).select(range(count))
