"""The answer that the page begins with: which merge, why, how sure, and what it costs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from osrm_peft.evaluation.scored import Choice, Combined, Measured, Scored, span
from osrm_peft.io.manifest import read_manifest

RULES = {
    "mean": "the mean score over tasks",
    "relative": "the mean over tasks of the score relative to the individual adapter's",
    "worst": "the least, over tasks, of the score relative to the individual adapter's",
}


@dataclass(frozen=True)
class Answer:
    """What the page says first.

    Attributes:
        merge: the merge to take, with λ.
        certain: whether a selection chose it on rows that were kept for that.
        why: a sentence.
        facts: {question: answer}.
        folder: of the merge, if it is here.
    """

    merge: str
    certain: bool
    why: str
    facts: dict[str, str]
    folder: Path | None


def of_choice(choice: Choice) -> Answer:
    """The answer of a selection."""
    first, tasks = choice.winner, len(choice.tasks)
    finalists = [line for line in choice.of(first.role) if not line.dropped]
    counted = f"{sum(first.rows.values()):,} rows of {_tasks(tasks)}"
    why = f"It is the best of {len(choice.of(first.role))} candidates by {RULES.get(choice.rule, choice.rule)}, on "
    why += f"{counted} that took no part in training."
    facts = {"Score": f"{first.mean.percent()}, the mean over {_tasks(tasks)}{_against(choice.lines)}"}
    if choice.rule != "mean" and first.value is not None:
        facts["Ranked by"] = f"{first.value.percent()} % of the adapter alone"
    facts["How sure"] = _sure(finalists)
    if first.kept is not None:
        facts["Adaptation kept"] = f"{100 * first.kept.value:.0f} % of what the adapters learned" + _range(first.kept)
    tested = [line for line in choice.test if line.name == first.name]
    if tested:
        facts["On rows that had no say in the choice"] = f"{tested[0].mean.percent()}{_against(choice.test)}"
    facts["What it costs"] = _sentence(cost(first))
    others = choice.of("per_task")
    if others and first.role == "merge":
        facts["With a mask for each task"] = f"{others[0].name} has {others[0].mean.percent()}; {cost(others[0])}"
    return Answer(first.name, True, why, facts, first.place)


def of_scores(table: Combined) -> Answer | None:
    """The answer where nothing was selected: the best mean over tasks; None without a merge."""
    ranked = [line for line in table.lines if line.role == "merge"] or table.lines
    if not ranked:
        return None
    first, tasks = ranked[0], len(table.metrics)
    of = f"the mean over {_tasks(tasks)}" if tasks > 1 else next(iter(table.metrics))
    alone = "" if first.alone is None else f"; the adapters alone {100 * first.alone:.1f}"
    facts = {"Score": f"{first.mean.percent()}, {of}{alone}"}
    if len(ranked) > 1:
        behind = 100 * (first.mean.value - ranked[1].mean.value)
        facts["The next"] = f"{_whole(ranked[1])}, {behind:.1f} behind"
    facts["How sure"] = (
        "Not known: the score is of the rows that it was chosen on, so it is too high. osrm-peft select chooses on "
        "some rows and tests on others."
    )
    if first.place is not None:
        facts["What it costs"] = _sentence(cost(first))
    others = [line for line in table.lines if line.role == "per_task"]
    if others and first.role == "merge":
        facts["With a mask for each task"] = f"{_whole(others[0])} has {others[0].mean.percent()}"
    why = f"It has the highest score of {_merges(len(ranked))} whose scores are here."
    return Answer(_whole(first), False, why, facts, first.place)


def cost(line: Scored) -> str:
    """Rank, size on disk, and whether serving it needs a mask for each task."""
    parts = ["a mask for each task at serving time" if line.role == "per_task" else "one adapter for all tasks"]
    manifest = {} if line.place is None else read_manifest(line.place)
    if manifest.get("kind") == "checkpoint":
        parts = ["a full model"]
    rank = manifest.get("written_rank", manifest.get("rank"))
    if rank is not None:
        parts.append(f"rank {rank}")
    if line.place is not None:
        parts.append(size(line.place))
    return ", ".join(parts)


def size(folder: Path) -> str:
    """What a folder's files take on disk: `"1.8 MB"`."""
    total: float = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    for unit in ("bytes", "kB", "MB", "GB"):
        if total < 1000 or unit == "GB":
            break
        total /= 1000
    number = f"{total:.0f}" if unit == "bytes" or total >= 100 else f"{total:.1f}"
    return f"{number}\N{NO-BREAK SPACE}{unit}"


def _sure(finalists: list[Scored]) -> str:
    if len(finalists) < 2 or finalists[1].behind is None:
        return "Nothing else was scored on as many rows."
    behind, name = finalists[1].behind, finalists[1].name
    text = f"It is {-100 * behind.value:.1f} ahead of the next, {name}"
    if behind.low is None or behind.high is None:
        return f"{text}; how much of that is chance is not known."
    ahead = f"{text} {span(-behind.high, -behind.low)}"
    return f"{ahead}: more than chance." if behind.high < 0 else f"{ahead}: within chance, so either will do."


def _against(lines: Iterable[Scored]) -> str:
    """Beside the winner's mean, those of the adapters and the base."""
    means = {line.role: f"{100 * line.mean.value:.1f}" for line in lines if line.role in ("individual", "base")}
    return f"; the adapters alone {means['individual']}, the base {means['base']}" if len(means) == 2 else ""


def _range(one: Measured) -> str:
    return "" if one.low is None or one.high is None else f" [{100 * one.low:.0f}, {100 * one.high:.0f}]"


def _whole(line: Scored) -> str:
    return f"{line.name} of {line.adapters} adapters" if line.adapters else line.name


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _tasks(number: int) -> str:
    return f"{number} tasks" if number != 1 else "one task"


def _merges(number: int) -> str:
    return f"{number} merges" if number != 1 else "the one merge"
