"""The demo's table over seeds, and its report."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from osrm_peft.evaluation.tables import MultiTaskTable, Score
from osrm_peft.io.manifest import versions

Selections = Mapping[int, Mapping[str, Mapping[str, Any]]]  # {seed: {init: the content of selection.json}}


def scores_of(selections: Selections) -> list[Score]:
    """The scores of all merges, on the rows that choose: init by init, merges in the order of the recipe."""
    first = next(iter(selections.values()))
    scores = []
    for init, selection in first.items():
        for name in ("individual adapters", *selection["candidates"]):
            scores += [one for seed, by in selections.items() for one in _row(init, by[init], name, seed)]
    return scores


def _row(init: str, selection: Mapping[str, Any], name: str, seed: int) -> list[Score]:
    lines = {line["name"]: line for line in (*selection["ranked"], *selection["apart"], selection["individual"])}
    line = lines[name]
    scale = (line["candidate"] or {}).get("scale")
    method = "individual" if line["candidate"] is None else name.rpartition(", λ")[0]
    method += ", λ by features" if line["candidate"] is not None and scale is None else ""
    return [Score(init, method, scale, seed, task, found["value"]) for task, found in line["scores"].items()]


def lead(selections: Selections) -> str:
    """The table that the report begins with: by kind of adapter the merge that was chosen, and what it keeps.

    Means over seeds, on the rows that had no say in the choice; ± sample standard deviation where there are several.
    """
    rows = ["| adapters | alone | one adapter for all: the merge that was chosen | its score | adaptation kept |",
            "|---|--:|---|--:|--:|"]  # fmt: skip
    for init in next(iter(selections.values())):
        chosen = [by_init[init]["ranked"][0]["name"] for by_init in selections.values()]
        tested = [{line["name"]: line for line in by_init[init]["test"]} for by_init in selections.values()]
        lines = [lines[name] for lines, name in zip(tested, chosen, strict=True)]
        alone = [lines["individual adapters"]["mean"]["value"] for lines in tested]
        kept = [line["kept"]["value"] for line in lines if line["kept"] is not None]
        merges = ", ".join(
            f"`{name}`" + f" ({chosen.count(name)}×)" * (len(chosen) > 1) for name in dict.fromkeys(chosen)
        )
        scores = [_percent(values, 1) for values in (alone, [line["mean"]["value"] for line in lines])]
        rows.append(f"| {init} | {scores[0]} | {merges} | {scores[1]} | {_percent(kept, 0)} |")
    return "\n".join(rows)


def _metrics(selections: Selections) -> str:
    """`Metrics: accuracy (questions, movie_reviews), matthews (sms_spam).`"""
    tasks = next(iter(next(iter(selections.values())).values()))["tasks"]
    names = dict.fromkeys(about["metric"] for about in tasks.values())
    of = {name: ", ".join(task for task, about in tasks.items() if about["metric"] == name) for name in names}
    return f"Metrics: {', '.join(f'{name} ({found})' for name, found in of.items())}."


def _percent(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.{digits}f}{spread}"


def report(
    table: MultiTaskTable,
    default: MultiTaskTable,
    selections: Selections,
    settings: Mapping[str, Any],
    command: str | None,
) -> str:
    """The Markdown report: the answers, tables, plots, settings and versions."""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    seeds = list(selections)
    answers = "\n".join(
        f"* seed {seed}, {init}: {selection['verdict']}"
        for seed, by_init in selections.items()
        for init, selection in by_init.items()
    )
    spread = "" if len(seeds) == 1 else f", mean ± sample standard deviation over {len(seeds)} seeds"
    noise = "" if len(seeds) > 1 else " (one seed: differences of a few points are noise)"
    return f"""# Demo: adapters by several choices of A, merged

{lead(selections)}

In percent, on rows that had no say in the choice of the merge{spread}.
*Adaptation kept* is (merged − base) / (alone − base), with the base model under the adapters' heads.

{answers}

Scores in percent on the rows that choose; seed {", ".join(map(str, seeds))}{noise}.
{_metrics(selections)}

## Each merge at its paper's scale

{default.markdown()}

## Every scale

{table.markdown()}

![average score against the scale](scales.png)

## Who acts on whose features

E‖τ_j h_t‖² / E‖W₀ h_t‖² in percent: how strongly the adapter of the row acts on the features of the column's task,
geometric mean over layers.
Below: what two adapters share of A, the inputs that they read, and of B, the outputs that they write.

![interference of the adapters](seed{seeds[0]}/interference/interference.png)

## How it was made

`{command or "run_demo(…)"}` on {platform.system()} {platform.machine()}, {made}

```json
{json.dumps(settings, ensure_ascii=False)}
```
"""
