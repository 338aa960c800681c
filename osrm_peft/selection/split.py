"""The rows that choose, and the rows that have no say in the choice and are scored last."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from osrm_peft.checks import integer
from osrm_peft.seeding import task_generator
from osrm_peft.tasks.task import Task


@dataclass(frozen=True)
class Split:
    """One task's rows for a selection.

    Attributes:
        choose: the task with the rows that choose as its validation rows, in the order in which they come in.
        test: the task with the rows for the last line as its validation rows; None where the task is too small.
        own_test: whether the task brought its test rows along.
    """

    choose: Task
    test: Task | None
    own_test: bool

    @classmethod
    def of(cls, task: Task, rows: int | None, seed: int) -> "Split":
        """Shuffle a task's validation rows and cut them.

        A task with test rows chooses on its validation rows. Any other keeps half of its validation rows for the test.

        Args:
            rows: at most so many to choose on, and as many for the test; None: all.
            seed: of the shuffle.

        Raises:
            ValueError: fewer than 4 validation rows.
        """
        count, own_test = len(task.validation), task.test is not None
        if count < 4:
            raise ValueError(f"task {task.name!r} has {count} validation rows: a choice needs at least 4")
        most = count if rows is None else integer("rows", rows, 2)
        order = _shuffled(count, task.name, seed)
        half = count if own_test else (count + 1) // 2
        chosen, rest = order[: min(half, most)], order[half:][:most]
        test = task.validation.select(rest) if task.test is None else task.test
        if task.test is not None:
            test = task.test.select(_shuffled(len(task.test), f"{task.name} test", seed)[:most])
        return cls(
            replace(task, validation=task.validation.select(chosen), test=None),
            replace(task, validation=test, test=None) if len(test) else None,
            own_test,
        )


def labels(task: Task) -> np.ndarray:
    """(N,) labels of a task's validation rows."""
    return np.asarray(task.validation["label"], dtype=np.float64)


def _shuffled(count: int, name: str, seed: int) -> list[int]:
    return torch.randperm(count, generator=task_generator(seed, name, "rows of a selection")).tolist()
