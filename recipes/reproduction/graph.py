"""A graph of small artefacts, each under the hash of what it is made from: what is there is not made again."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from osrm_peft.distributed import ALONE, Processes
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import versions

Make = Callable[[Path, Mapping[str, Path], Processes], None]


@dataclass(frozen=True, eq=False)
class Node:
    """One artefact: a file or a folder.

    Attributes:
        kind: of artefact; its folder in the cache.
        about: all that decides what it is, besides its inputs; for JSON.
        make: make(path, {input: its path}, processes) writes it, complete or not at all. All processes call it.
        inputs: {name: Node}.
        suffix: of its file; "" for a folder.
        cost: how much work it is, in `unit`.
        unit: "steps" of training, "rows" that go through a model, …
    """

    kind: str
    about: Mapping[str, Any]
    make: Make
    inputs: Mapping[str, "Node"] = field(default_factory=dict)
    suffix: str = ""
    cost: float = 1
    unit: str = "files"

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits of kind, about, and the inputs' keys."""
        content = {
            "kind": self.kind,
            "about": self.about,
            "inputs": {name: one.key for name, one in self.inputs.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, cache: Path) -> Path:
        """Where it lies."""
        return cache / self.kind / f"{self.key}{self.suffix}"

    def note(self, cache: Path) -> Path:
        """What tells that it is complete, and how it was made."""
        return cache / self.kind / f"{self.key}.note.json"


def ordered(wanted: Iterable[Node], is_there: Callable[[Node], bool] = lambda node: False) -> list[Node]:
    """The nodes and all that they need, inputs first, equal ones once; what is there is left out, with its inputs."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.key not in found and not is_there(node):
            for one in node.inputs.values():
                visit(one)
            found[node.key] = node

    for node in wanted:
        visit(node)
    return list(found.values())


def missing(wanted: Iterable[Node], cache: Path) -> list[Node]:
    """Those to make, inputs first: what only artefacts that are there need is not made."""
    return ordered(wanted, lambda node: node.note(cache).is_file())


def levels(nodes: Iterable[Node]) -> list[list[Node]]:
    """Groups of nodes that need only nodes of earlier groups: the nodes of one can be made at the same time."""
    depth: dict[str, int] = {}
    groups: list[list[Node]] = []
    for node in nodes:
        below = [depth[one.key] for one in node.inputs.values() if one.key in depth]
        depth[node.key] = 1 + max(below, default=-1)
        groups.extend([] for _ in range(depth[node.key] + 1 - len(groups)))
        groups[depth[node.key]].append(node)
    return groups


def make(node: Node, cache: Path, processes: Processes = ALONE) -> None:
    """Make one node, whose inputs are there."""
    start = time.perf_counter()
    node.make(node.path(cache), {name: one.path(cache) for name, one in node.inputs.items()}, processes)
    if processes.is_main_process:
        note = {"kind": node.kind, "about": node.about, "inputs": {name: one.key for name, one in node.inputs.items()}}
        cost = {"seconds": time.perf_counter() - start, "cost": node.cost, "unit": node.unit}
        write_json(node.note(cache), note | cost | {"versions": versions()})


def run(wanted: Iterable[Node], cache: Path, processes: Processes = ALONE, console: Console | None = None) -> None:
    """Make what is missing, one after the other; the processes share the work of each."""
    console = console or Console(quiet=True)
    todo = processes.broadcast_from_main(lambda: [node.key for node in missing(wanted, cache)])
    nodes = {node.key: node for node in ordered(wanted)}
    for place, key in enumerate(todo, 1):
        node = nodes[key]
        if processes.is_main_process:
            console.print(f"[{place}/{len(todo)}] {node.kind} {_short(node.about)}", markup=False, highlight=False)
        make(node, cache, processes)


def dispatch(wanted: Iterable[Node], cache: Path, executor: Any, console: Console | None = None) -> None:
    """Make what is missing by an executor of `submitit`: an array of jobs for each level of the graph.

    Args:
        executor: `submitit.AutoExecutor`, its parameters (time, GPUs, partition, …) set.

    Raises:
        RuntimeError: jobs failed; names the first, with its log. What others made is kept.
    """
    console = console or Console(quiet=True)
    for level in levels(missing(wanted, cache)):
        with executor.batch():
            jobs = [executor.submit(make, node, cache) for node in level]
        console.print(f"{len(jobs)} jobs: {', '.join(sorted({node.kind for node in level}))}", highlight=False)
        failed = [(node, job) for node, job in zip(level, jobs, strict=True) if job.exception() is not None]
        if failed:
            node, job = failed[0]
            what = f"{node.kind} {_short(node.about)}: {job.exception()}"
            raise RuntimeError(f"{len(failed)} of {len(jobs)} jobs failed; the first was to make {what}")


def plan_table(wanted: Iterable[Node], cache: Path) -> Table:
    """What would be made, and its cost; in time where such artefacts of the same model were made here before."""
    every, todo = ordered(wanted), {node.key for node in missing(wanted, cache)}
    table = Table(title="What the experiments need", title_justify="left")
    for column in ("artefact", "all", "there", "to make", "work", "about"):
        table.add_column(column, justify="left" if column == "artefact" else "right")
    total = 0.0
    for kind in dict.fromkeys(node.kind for node in every):
        nodes = [node for node in every if node.kind == kind]
        left = [node for node in nodes if node.key in todo]
        work, speed = sum(node.cost for node in left), _seconds_per_cost(cache / kind, nodes[0].about.get("model"))
        total += (speed or 0) * work
        there = sum(node.note(cache).is_file() for node in nodes)
        cells = [f"{len(nodes)}", f"{there}", f"{len(left)}", f"{work:g} {nodes[0].unit}"]
        table.add_row(kind, *cells, "" if speed is None else f"{speed * work / 60:.0f} min")
    table.add_row("", "", "", f"{len(todo)}", "", f"{total / 60:.0f} min" if total else "")
    return table


def _seconds_per_cost(folder: Path, model: Any) -> float | None:
    """As of artefacts of the same model in this folder; None where there are none."""
    notes = [read_object(path) for path in folder.glob("*.note.json")]
    notes = [note for note in notes if note["about"].get("model") == model]
    cost = sum(note["cost"] for note in notes)
    return sum(note["seconds"] for note in notes) / cost if cost else None


def _short(about: Mapping[str, Any]) -> str:
    """On one line: numbers, names and short lists."""
    parts = {name: value for name, value in about.items() if not isinstance(value, dict)}
    return ", ".join(f"{k}={v}" for k, v in parts.items() if not (isinstance(v, list) and len(v) > 3))
