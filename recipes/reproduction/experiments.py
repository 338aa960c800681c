"""The experiments of both papers: which artefacts each needs, and the table or the plot that it makes of them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from osrm_peft.distributed import Processes
from osrm_peft.evaluation.tables import Score
from osrm_peft.io.manifest import read_manifest
from reproduction.graph import Node
from reproduction.merges import MERGES, Merge
from reproduction.papers import figures
from reproduction.suite import OSRM, PLAIN, Suite

EVERY = {label: merge._replace(scales=(merge.default_scale(),)) for label, merge in MERGES.items()}
EVERY["core ties"] = Merge("ties", (1.0,), {"space": "core"})
FEW = ("task_arithmetic", "ties", "emr")  # where an experiment varies something else
BLOCKS = {"q": 1, "q, v": 2, "q, k, v": 3}


class Cell(NamedTuple):
    """Where the scores of a node go: table row (label, method), seed; x of the plot, if it has one."""

    label: str
    method: str
    seed: int
    node: Node
    x: float | str = ""


@dataclass(frozen=True)
class Experiment:
    """What one experiment needs, and shows.

    Attributes:
        name: as in the configuration.
        title: with the paper's table or figure.
        cells: of its table of scores.
        note: what one must know to read it.
        x: what its plot has on the axis; "" for none: no plot of scores, one of values over layers; "λ" for a panel a
            method.
        averaged: show the mean over tasks only (their number differs).
        values: {column, or x: node} of an experiment that has no scores.
        read: of these: read(path of the node's artefact) → {layer: value}.
        made: what another recipe wrote: a folder `results` with `table.md`, plots and scores.
    """

    name: str
    title: str
    note: str = ""
    cells: list[Cell] = field(default_factory=list)
    x: str = ""
    averaged: bool = False
    values: Mapping[Any, Node] = field(default_factory=dict)
    read: Callable[[Path], dict[str, float]] | None = None
    made: Node | None = None

    def needs(self) -> list[Node]:
        """All nodes whose artefacts are shown."""
        return [cell.node for cell in self.cells] + [*self.values.values(), *([self.made] if self.made else [])]

    def scores(self, cache: Path) -> Iterator[tuple[Score, float | str]]:
        """(score, x) of every cell."""
        for cell in self.cells:
            for one in json.loads(cell.node.path(cache).read_text(encoding="utf-8"))["scores"]:
                yield Score(cell.label, cell.method, one["scale"], cell.seed, one["task"], one["score"]), cell.x


def main(suite: Suite, options: Mapping[str, Any]) -> Experiment:
    """Individual adapters and every merge, without and with OSRM."""
    cells = [cell for seed in suite.seeds for init in (PLAIN, OSRM) for cell in _row(suite, init, init, seed, EVERY)]
    title = "Individual and merged adapters, without and with OSRM (OSRM, Tables 1–5, 11–15)"
    note = (
        "*TA features* is task arithmetic with weights chosen by features, *lore features* LoRE with its scale chosen "
        "so, *knots ties* and *core ties* are TIES in KnOTS' and in the core space."
    )
    return Experiment("main", title, note, cells)


def rank(suite: Suite, options: Mapping[str, Any]) -> Experiment:
    """Rank of H against k."""
    ks, seed = options.get("num_samples", [2, 10, 50, 100]), suite.seeds[0]
    values = {k: replace(suite, num_samples=k).ranks(suite.tasks[0], seed) for k in ks}
    title = "Rank of H, the others' samples, against k (OSRM, Fig. 2)"
    note = f"Of all tasks but {suite.tasks[0]}, the statistic `sample`: a row of H is the mean of one sample's tokens."
    return Experiment("rank", title, note, x="k", values=values, read=_json)


def drift(suite: Suite, options: Mapping[str, Any]) -> Experiment:
    """How far training moves A from the A that OSRM chose, in each layer."""
    values = {task: suite.adapter(OSRM, task, suite.seeds[0]) for task in suite.tasks}
    title = "Change of Ã after fine-tuning, a layer (OSRM, Fig. 3)"
    note = "Procrustes distance of A to the Ã that OSRM chose, relative to ‖Ã‖."
    return Experiment("drift", title, note, values=values, read=_drift)


def scales(suite: Suite, options: Mapping[str, Any]) -> Experiment:
    """Score against λ."""
    steps = tuple(options.get("scales", [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]))
    merges = {name: Merge(name, steps) for name in ("task_arithmetic", "ties")}
    cells = [cell for init in (PLAIN, OSRM) for cell in _merged(suite, init, init, suite.seeds[0], merges, suite.tasks)]
    return Experiment("scales", "Score against λ (OSRM, Fig. 4)", cells=cells, x="λ")


def tasks(suite: Suite, options: Mapping[str, Any]) -> Experiment:
    """Score against the number of tasks, each adapter away from the others among them only."""
    cells, merges = [], {name: EVERY[name] for name in options.get("merges", FEW)}
    for count in options.get("tasks", range(2, len(suite.tasks) + 1)):
        for init in (PLAIN, OSRM):
            some, label = suite.tasks[:count], f"{init}, N = {count}"
            cells += _row(suite, init, label, suite.seeds[0], merges, count, some)
    note = f"The first N of {', '.join(suite.tasks)}, which differ in difficulty: see the individual adapters."
    return Experiment("tasks", "Score against the number of tasks N (OSRM, Fig. 5)", note, cells, "N", averaged=True)


def samples(suite: Suite, options: Mapping[str, Any]) -> Experiment:
    """Score against k, the samples that features are of."""
    cells, merges = [], {name: EVERY[name] for name in options.get("merges", FEW)}
    for k in options.get("num_samples", [2, 10, 100, 1000]):
        cells += _row(replace(suite, num_samples=k, tuned=suite), OSRM, f"{OSRM}, k = {k}", suite.seeds[0], merges, k)
    note = "At the learning rates that were chosen with the main table's k."
    return Experiment("samples", "Score against the number of samples k (OSRM, Table 6)", note, cells, x="k")


def blocks(suite: Suite, options: Mapping[str, Any]) -> Experiment:
    """Which projections are trained."""
    cells, merges = [], {name: EVERY[name] for name in options.get("merges", FEW)}
    names = options["modules"]  # those of q, k and v in this model
    for block, modules in {"q": names[:1], "q, v": [names[0], names[2]], "q, k, v": names}.items():
        one = replace(suite, lora=suite.lora | {"target_modules": modules}, tuned=suite)
        for init in (PLAIN, OSRM):
            cells += _row(one, init, f"{init}, {block}", suite.seeds[0], merges, BLOCKS[block])
    return Experiment("blocks", "Learnable blocks (OSRM, Table 7)", "At the learning rates of the main table.", cells)


def post(suite: Suite, options: Mapping[str, Any]) -> Experiment:
    """OSRM applied to adapters that are trained already."""
    seed, merges = suite.seeds[0], {name: EVERY[name] for name in options.get("merges", FEW)}
    cells = _row(suite, PLAIN, PLAIN, seed, merges)
    for label, chosen in {"projected, as in the paper": {}, "projected, keep = 0.9": {"min_effect_kept": 0.9}}.items():
        adapters = {task: suite.projected(task, seed, chosen) for task in suite.tasks}
        cells += [Cell(label, "individual", seed, suite.alone(task, one, seed)) for task, one in adapters.items()]
        cells += [Cell(label, name, seed, suite.merged(merge, adapters, seed)) for name, merge in merges.items()]
    return Experiment("post", "OSRM applied after fine-tuning (OSRM, Table 16)", cells=cells)


def lore(suite: Suite, options: Mapping[str, Any]) -> Experiment:
    """LoRE-Merging of full models and of checkpoints, by `recipes/lore_checkpoints.py`; on the packaged model only."""
    import lore_checkpoints as recipe

    def make(path: Path, inputs: Mapping[str, Path], processes: Processes) -> None:
        if processes.num_processes > 1:
            raise ValueError("lore trains in one process: make it without accelerate launch (--experiments lore)")
        recipe.reproduce(path)

    setting = recipe.CLASSIFIER
    made = Node("lore", setting.about(), make, cost=len(setting.tasks) * setting.steps, unit="steps")
    return Experiment("lore", "Full models and checkpoints of one run (LoRE, Table 1 and Fig. 1)", made=made)


EXPERIMENTS = {one.__name__: one for one in (main, rank, drift, scales, tasks, samples, blocks, post, lore)}


def planned(suite: Suite, names: Sequence[str]) -> list[Experiment]:
    """The experiments of a configuration.

    Raises:
        ValueError: one that is unknown, or that the configuration does not have; or the paper has no such model.
    """
    unknown = [name for name in (*names, *suite.experiments) if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"unknown experiment {unknown[0]!r}: choose from {', '.join(EXPERIMENTS)}")
    models = figures()["main"]["tables"]
    if suite.paper is not None and suite.paper not in models:
        raise ValueError(f"paper={suite.paper!r} has no figures: choose from {', '.join(models)}, or leave it out")
    absent = [name for name in names if name not in suite.experiments]
    if absent:
        raise ValueError(f"the configuration has no experiment {absent[0]!r}: it has {', '.join(suite.experiments)}")
    return [EXPERIMENTS[name](suite, suite.experiments[name] or {}) for name in names or suite.experiments]


def _row(
    suite: Suite, init: str, label: str, seed: int, merges: Mapping[str, Merge], x: float | str = "",
    tasks: Sequence[str] | None = None,
) -> list[Cell]:  # fmt: skip
    """Individual scores, and those of the merges."""
    tasks = suite.tasks if tasks is None else tasks
    alone = [
        Cell(label, "individual", seed, suite.alone(task, suite.adapter(init, task, seed, tasks), seed), x)
        for task in tasks
    ]
    return alone + _merged(suite, init, label, seed, merges, tasks, x)


def _merged(
    suite: Suite, init: str, label: str, seed: int, merges: Mapping[str, Merge], tasks: Sequence[str],
    x: float | str = "",
) -> list[Cell]:  # fmt: skip
    adapters = {task: suite.adapter(init, task, seed, tasks) for task in tasks}
    return [Cell(label, name, seed, suite.merged(merge, adapters, seed), x) for name, merge in merges.items()]


def _json(path: Path) -> dict[str, float]:
    return json.loads(path.read_text(encoding="utf-8"))


def _drift(path: Path) -> dict[str, float]:
    """The last log's drift of each layer."""
    logs = [log for log in read_manifest(path)["log"] if "osrm/drift" in log]
    prefix = "osrm/drift/"
    return {name.removeprefix(prefix): value for name, value in logs[-1].items() if name.startswith(prefix)}
