"""The part of `evaluate` that asks lm-eval: which tasks, of which subject, and the table of its scores."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import HORIZONTALS
from rich.markup import escape
from rich.table import Table

from osrm_peft.checks import shown
from osrm_peft.devices import local_device
from osrm_peft.evaluation.harness import HarnessScore, check_harness_tasks, evaluate_with_harness
from osrm_peft.evaluation.subjects import Subject
from osrm_peft.tasks.suites import Suite, list_tasks, load_task
from osrm_peft.tasks.text import TextTask

_WORDS = "packaged-text"  # the suite of ours that needs no suite to be named


def harness_tasks(subject: Subject, asked: Sequence[str], suite: Suite | None) -> list[TextTask | str]:
    """The tasks of these names, checked before any work: a suite's text tasks, one of its tasks, or lm-eval's.

    Args:
        suite: None: what the subject was trained on, and the packaged suite in words.

    Raises:
        ValueError: a task without rows of prompt and completion, one that lm-eval does not know, or one that an EMR
            merge has no mask for.
    """
    found: list[Any] = []
    for name in asked:
        if name == _WORDS or name.startswith("files:"):
            found += [load_task(name, one) for one in list_tasks(name)]
        else:
            own = _suite_with(name, subject, suite)
            found.append(name if own is None else load_task(own, name))
    check_harness_tasks(found)
    for one in found if subject.kind == "emr" else ():
        name = one if isinstance(one, str) else one.name
        if name not in (subject.tasks or ()):
            tasks = ", ".join(subject.tasks or ())
            raise ValueError(f"{subject.name} is a model for each of its tasks ({tasks}), and {shown(name)} is none")
    return found


def _suite_with(name: str, subject: Subject, suite: Suite | None) -> Suite | None:
    """The suite that has a task of this name; None: lm-eval may have it."""
    if suite is not None:
        return suite if name in list_tasks(suite) else None
    own = subject.suite if name in (subject.tasks or ()) else None
    return own or (_WORDS if name in list_tasks(_WORDS) else None)


def scores_of(subject: Subject, tasks: Sequence[TextTask | str], **options: Any) -> list[HarnessScore]:
    """Scores by lm-eval: `options` are those of `evaluate_with_harness`."""
    alone = [one for one in tasks if isinstance(one, TextTask) and subject.apart(one.name)]
    together = [one for one in tasks if one not in alone]
    found = []
    for part in [[one] for one in alone] + ([together] if together else []):
        name = part[0] if isinstance(part[0], str) else part[0].name
        model, tokenizer = subject.load(name, in_words=True)
        on_device: Any = model.to(local_device())  # type: ignore[arg-type]
        found += evaluate_with_harness(on_device, part, tokenizer, **options)
    order = [one if isinstance(one, str) else one.name for one in tasks]
    return sorted(found, key=lambda one: order.index(one.task) if one.task in order else len(order))


def harness_records(scores: Iterable[HarnessScore]) -> list[dict[str, Any]]:
    """What manifests and result files say of each metric of each task."""
    return [one.record() for one in scores]


def harness_table(facts: Sequence[Mapping[str, Any]]) -> Table:
    """For `rich` to print: the scores as lm-eval has them."""
    table = Table(
        title=f"Scores by lm-eval {facts[0]['harness']['lm_eval']}",
        title_justify="left",
        box=HORIZONTALS,
        show_edge=False,
    )
    for name in ("", "task", "metric"):
        table.add_column(name)
    for name in ("score", "±", "rows", "shots"):
        table.add_column(name, justify="right")
    before = None
    for one in facts:
        name, before = ("" if one["name"] == before else one["name"]), one["name"]
        stderr, shots = one["stderr"], one["harness"]["num_fewshot"]
        numbers = [f"{one['value']:.4f}", "" if stderr is None else f"{stderr:.4f}", f"{one['rows']:,}", str(shots)]
        table.add_row(*map(escape, (name, one["task"], one["metric"], *numbers)))
    return table
