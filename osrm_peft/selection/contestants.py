"""Contestants: whatever can be scored on a task, with the predictions or scores that it has so far."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from osrm_peft.adapters.live import LiveBase, applied_to
from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.checks import number
from osrm_peft.evaluation.bootstrap import metric_on, resamples
from osrm_peft.evaluation.evaluate import outputs_of, predicted, tokens_of
from osrm_peft.io.places import new_file
from osrm_peft.merging.emr_adapter import EMRAdapter
from osrm_peft.merging.merged_adapter import MergedAdapter
from osrm_peft.selection.split import Split, labels
from osrm_peft.tasks.task import Task


class Entry(Protocol):
    """What is scored: adapters, a merge, or the base model under the tasks' heads."""

    def on(self, live: LiveBase, task: str) -> Any:
        """A context in which the live model is the entry's model for this task."""
        ...


@dataclass(frozen=True)
class Alone:
    """The adapters, each on its own task; or, bare, the base model with their heads."""

    adapters: Mapping[str, LoraAdapter]
    bare: bool = False

    def on(self, live: LiveBase, task: str) -> Any:
        """The task's own adapter in the live model."""
        adapter = self.adapters[task]
        bare = replace(adapter, factors={}, modules={})
        return applied_to(bare if self.bare else adapter, live.of(adapter))


@dataclass(frozen=True)
class Merge:
    """A merge, made when it is first used."""

    make: Callable[[], MergedAdapter | EMRAdapter]

    def on(self, live: LiveBase, task: str) -> Any:
        """The merge with the task's head in the live model."""
        merged = self.make()
        return merged.applied_to(live.of(merged.tasks[task]), task)


@dataclass
class Contestant:
    """An entry and what is known of it.

    Attributes:
        name: as the table shows it.
        entry: what is scored.
        about: what the entry is made of, for the cache.
        found: {task: (rows so far,) predictions}; or, of a score that is a function, {task: {rows: score}}.
        path: the cache file.
    """

    name: str
    entry: Entry
    about: Any
    found: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def read(self, folder: Path | None, context: Any) -> None:
        """Take over what an earlier run has found, if everything that the predictions depend on is the same."""
        if folder is None:
            return
        key = hashlib.sha256(json.dumps([self.about, context], sort_keys=True, default=str).encode()).hexdigest()
        self.path = folder / f"{key[:24]}.safetensors"
        if self.path.is_file():
            try:
                self.found = dict(load_file(self.path))
            except (SafetensorError, ValueError, OSError) as error:
                raise ValueError(f"{self.path} is damaged ({error}): remove it, and it is made again") from error

    def write(self) -> None:
        """Keep what is known, complete after every task."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(self.path) as partial:
                save_file({key: np.ascontiguousarray(value) for key, value in self.found.items()}, partial)


class Scorer:
    """Scores contestants on the first rows of each task; rows that are known are not computed again.

    Attributes:
        rows: {task: its rows}.
        seed: of the resamples.
        scored: rows that were scored, all tasks together.
        step: called with what is scored next, and how many rows.
    """

    def __init__(
        self,
        rows: Mapping[str, Split],
        live: LiveBase,
        tokenizer: Any,
        *,
        max_length: int,
        seed: int,
        score: Callable[[PreTrainedModel, Task], float] | None = None,
    ) -> None:
        self.rows, self.live, self.tokenizer, self.seed = rows, live, tokenizer, seed
        self.max_length, self.score, self.scored = max_length, score, 0
        self.step: Callable[[str, int], None] = lambda what, rows: None
        self._tokens: dict[str, Any] = {}
        self._counts: dict[tuple[str, int], np.ndarray] = {}
        self._known: dict[tuple[str, str, int], np.ndarray] = {}

    def on(self, contestant: Contestant, share: float) -> dict[str, np.ndarray]:
        """{task: (1 + B,) the score on this share of the rows that choose, and on resamples of them}."""
        return {
            name: self._values(contestant, name, rows.choose, self.size(name, share))
            for name, rows in self.rows.items()
        }

    def size(self, task: str, share: float) -> int:
        """How many rows of a task a share of them is."""
        return max(2, round(share * len(self.rows[task].choose.validation)))

    def on_test(self, contestant: Contestant) -> dict[str, np.ndarray]:
        """The same on the rows that had no say in the choice, of the tasks that have such rows."""
        tasks = {name: rows.test for name, rows in self.rows.items() if rows.test is not None}
        return {
            name: self._values(contestant, f"{name}/test", task, len(task.validation)) for name, task in tasks.items()
        }

    def _values(self, contestant: Contestant, key: str, task: Task, size: int) -> np.ndarray:
        if (contestant.name, key, size) not in self._known:
            measure = self._measured if self.score is None else self._called
            try:
                self._known[contestant.name, key, size] = measure(contestant, key, task, size)
            except (ValueError, torch.linalg.LinAlgError) as error:
                raise ValueError(f"{contestant.name!r} has no score on {task.name!r}: {error}") from error
        return self._known[contestant.name, key, size]

    def _measured(self, contestant: Contestant, key: str, task: Task, size: int) -> np.ndarray:
        """The task's metric on its first rows, and on resamples of them."""
        known = contestant.found.get(key, np.zeros(0))
        if len(known) < size:
            self._count(contestant, task, size - len(known))
            tokens = self._tokenized(key, task).select(range(len(known), size))
            with contestant.entry.on(self.live, task.name) as model:
                outputs = outputs_of(model, task, tokens, self.tokenizer)
            known = np.concatenate([known, predicted(task, outputs).double().numpy()])
            contestant.found[key] = known
            contestant.write()
        if (key, size) not in self._counts:
            self._counts[key, size] = resamples(key, size, self.seed)
        return metric_on(task.metric, known[:size], labels(task)[:size], self._counts[key, size])

    def _called(self, contestant: Contestant, key: str, task: Task, size: int) -> np.ndarray:
        """The user's own score of a task's first rows."""
        known = contestant.found.setdefault(f"{key}/{size}", np.zeros(0))
        if not len(known):
            assert self.score is not None
            self._count(contestant, task, size)
            part = replace(task, validation=task.validation.select(range(size)))
            with contestant.entry.on(self.live, task.name) as model:
                known = np.array([number(f"the score of {contestant.name} on {task.name}", self.score(model, part))])
            contestant.found[f"{key}/{size}"] = known
            contestant.write()
        return known

    def _count(self, contestant: Contestant, task: Task, rows: int) -> None:
        self.scored += rows
        self.step(f"{contestant.name} on {task.name}", rows)

    def _tokenized(self, key: str, task: Task) -> Any:
        if key not in self._tokens:
            self._tokens[key] = tokens_of(task, self.tokenizer, self.max_length)
        return self._tokens[key]
